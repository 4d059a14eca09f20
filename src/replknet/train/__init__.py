"""Training: a recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

from replknet.train.checkpoint import StateError
from replknet.train.fit import ResumeError, fit
from replknet.train.guard import LossError

__all__ = ["LossError", "ResumeError", "StateError", "fit"]
