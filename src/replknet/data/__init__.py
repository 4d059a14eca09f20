"""Data sets, a file each, and transforms."""
