"""Inference form, export and the check that a file computes what torch does."""

from replknet.deploy.inference import BOUNDS, Optimized, Report, optimize

__all__ = ["BOUNDS", "Optimized", "Report", "optimize"]
