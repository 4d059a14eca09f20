"""The small callbacks of a training, and what several callbacks use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from replknet.data.sampling import seed_all
from replknet.kernels.malloc import give_back_fragments

# tells the random numbers of a step from those of an image
_STEP = -1


@dataclass(frozen=True)
class Kept:
    """How the network of a training is kept: written to a file, and built anew without weights."""

    save: Callable[[nn.Module, Path], None]
    build: Callable[[], nn.Module]


def scores_of(trainer: pl.Trainer) -> dict[str, float]:
    """What the validation of this epoch found; nothing where there was none."""
    if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
        # those of an earlier epoch are still there
        return {}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}


class ScoreLast(pl.Callback):
    """The last epoch is scored, whatever is of those before it."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class SeedSteps(pl.Callback):
    """Mixing and drop path get random numbers that belong to the seed, the step and the process."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        seed_all(self.seed, _STEP, trainer.current_epoch, batch_idx, trainer.global_rank)


class GiveBackMemory(pl.Callback):
    """On a CPU, keep the gaps in the C library's memory from growing with the steps."""

    _EVERY = 100

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        # the gradients and activations of the step before are gone
        if module.device.type == "cpu" and batch_idx % self._EVERY == 0:
            give_back_fragments()


class PreciseBN(pl.Callback):
    """Batch norms get the statistics of training batches as they are now, before an epoch is scored and kept.

    Their running averages are of networks some steps before, and an average of weights has no statistics of its own
    but the average of theirs. Each process takes its own images.

    Args:
        batches: how many; 0 leaves the running averages.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._compute(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            self._compute(trainer, module)

    def _compute(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.batches:
            drawn: Iterator[Any] = trainer.datamodule.first(self.batches)  # type: ignore[attr-defined]  # fit() gives ours
            x = (images.contiguous(memory_format=torch.channels_last) for images, _ in drawn)
            update_bn(x, module.weights, module.device)  # type: ignore[arg-type]  # a task's network
