"""Inference form, export and the check that a file computes what torch does."""

from replknet.deploy.inference import BOUNDS, Changes, Optimized, optimize

__all__ = ["BOUNDS", "Changes", "Optimized", "optimize"]
