"""Segmentation: its files, networks, inference, training, export and recipes."""
