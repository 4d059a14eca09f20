"""Inference form, exported files, and the check that a file computes what torch computes."""

from replknet.deploy.inference import BOUNDS, Changes, Optimized, optimize

__all__ = ["BOUNDS", "Changes", "Optimized", "optimize"]
