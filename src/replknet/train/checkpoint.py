"""The files from which a training goes on, and the weights beside them."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule

from replknet.train.callbacks import Kept
from replknet.train.curve import KeepCurve
from replknet.train.state import StateError


class KeepState(pl.Callback):
    """Write the weights and the state after each epoch, and within it every so many steps.

    The files are `model.safetensors` (to use), `best.safetensors` (weights of the epoch with the best score) and
    `last.ckpt` (to go on from), in this order. A file gets its name when it is complete. The curve comes before them,
    so wherever the process ends, the other files have all that `last.ckpt` says is done.

    Args:
        folder: where the files go.
        kept: how the network is built and written.
        recipe: goes into `last.ckpt`, to be compared when the training goes on.
        curve: comes before this callback in the Trainer's list.
        every: steps between two states within an epoch; None for none.
        score: name of the score that decides what is best.

    Raises:
        StateError: in the hooks, where a file cannot be written; the state before stays.
    """

    def __init__(
        self, folder: Path, kept: Kept, recipe: dict[str, Any], curve: KeepCurve, every: int | None, score: str
    ) -> None:
        self.folder, self.kept, self.recipe = folder, kept, recipe
        self.curve, self.every, self.score = curve, every, score

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet_recipe"] = self.recipe

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        between_steps = batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0
        if self.every is not None and between_steps and trainer.global_step % self.every == 0:
            self.keep(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer, module, self.curve.last_is_best(self.score))

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the weights and the state between two steps of an epoch.

        Args:
            trainer: writes the state.
            module: has the weights.

        Raises:
            StateError: a file cannot be written.
        """
        self.curve.catch_up(trainer)
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, best: bool = False) -> None:
        part = self.folder / "last.ckpt.part"
        try:
            model = _whole(trainer, module, self.kept)
            if trainer.is_global_zero:
                for name in ("model", "best") if best else ("model",):
                    self.kept.save(model, self.folder / f"{name}.safetensors")
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                os.replace(part, self.folder / "last.ckpt")
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise StateError(
                f"the state of step {trainer.global_step} could not be written to {self.folder} ({error}); the one "
                "before is still in last.ckpt, and --resume goes on from it once there is room"
            ) from error


def _whole(trainer: pl.Trainer, module: pl.LightningModule, kept: Kept) -> nn.Module:
    """The network to be kept; where its weights are divided, the first process puts them together."""
    model = module.weights
    assert isinstance(model, nn.Module)
    if not isinstance(model, FSDPModule):
        return model
    state = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return model
    with torch.device("meta"):
        whole = kept.build()
    whole.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, assign=True)
    return whole
