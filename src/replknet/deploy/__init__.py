"""Inference form, export and the check that a file computes what torch does."""
