"""Training: a recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

from replknet.train.callbacks import LossError, StateError
from replknet.train.fit import ResumeError, fit

__all__ = ["LossError", "ResumeError", "StateError", "fit"]
