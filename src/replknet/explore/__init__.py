"""Experiments that run: the demo, and the paper's guidelines and tables."""
