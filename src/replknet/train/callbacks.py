"""What a training keeps: its last state, and the weights in a file of their own."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from replknet.models import Description, RepLKNet, save_model


class KeepLast(pl.Callback):
    """Write `last.ckpt` (to go on) and `model.safetensors` (to use) after each epoch and when interrupted.

    Files get their names only when they are complete, so an interruption while writing loses nothing.
    """

    def __init__(self, folder: Path, description: Description, recipe: dict[str, Any]) -> None:
        self.folder, self.description, self.recipe = folder, description, recipe

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet_recipe"] = self.recipe

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        # before the first step there is nothing to keep
        if trainer.global_step > 0:
            self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        part = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / "last.ckpt")
            model = module.weights
            assert isinstance(model, RepLKNet)
            save_model(model, self.folder / "model.safetensors", self.description)
