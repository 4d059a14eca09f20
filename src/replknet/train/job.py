"""What `fit` needs to know of a task: classification and segmentation each make one from their recipe."""

from dataclasses import dataclass

import pytorch_lightning as pl

from replknet.train.callbacks import Kept
from replknet.train.datasets import Splits


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training, ready but for the Trainer.

    Args:
        task: network, loss and optimisation.
        sets: the data.
        epochs: passes over the training images.
        kept: how the network is written.
        score: name of the score that decides which epoch is best.
        score_every: epochs from one validation to the next.
        callbacks: the task's own.
    """

    task: pl.LightningModule
    sets: Splits
    epochs: int
    kept: Kept
    score: str
    score_every: int = 1
    callbacks: tuple[pl.Callback, ...] = ()
