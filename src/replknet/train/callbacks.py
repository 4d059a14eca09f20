"""What a training keeps: its last state, and the weights in a file of their own."""

import json
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from replknet.models import Description, RepLKNet, save_model


class KeepLast(pl.Callback):
    """Write the state, the weights and the curve after each epoch, and the first two when interrupted.

    They are `last.ckpt` (to go on), `model.safetensors` (to use) and `metrics.json` (a row an epoch). Files
    get their names only when they are complete, so an interruption while writing loses nothing.
    """

    def __init__(self, folder: Path, description: Description, recipe: dict[str, Any]) -> None:
        self.folder, self.description, self.recipe = folder, description, recipe
        self.curve: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = list(state_dict["curve"])

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet_recipe"] = self.recipe

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.curve.append({"epoch": trainer.current_epoch, **row})
        self._write(trainer, module)
        part = self.folder / "metrics.json.part"
        if trainer.is_global_zero:
            part.write_text(json.dumps(self.curve, indent=1) + "\n")
            os.replace(part, self.folder / "metrics.json")

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
