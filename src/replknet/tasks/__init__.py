"""Tasks: loss, prediction and metric."""
