"""Training: recipes to results."""

from replknet.train.fit import ResumeError, fit

__all__ = ["ResumeError", "fit"]
