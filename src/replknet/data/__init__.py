"""Data sets, one a file, and transforms."""
