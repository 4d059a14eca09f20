"""Training: a recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

from replknet.train.callbacks import CheckpointError, LossError
from replknet.train.fit import ResumeError, fit

__all__ = ["CheckpointError", "LossError", "ResumeError", "fit"]
