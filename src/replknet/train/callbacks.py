"""What a training keeps: its last state, and the weights in a file of their own."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from replknet.models import Description, RepLKNet, save_model


class KeepLast(pl.Callback):
    """Write the curve, the weights and the state after each epoch, and the last two when interrupted.

    They are `metrics.json` (a row an epoch), `model.safetensors` (to use) and `last.ckpt` (to go on), in this
    order, and files get their names only when they are complete: what `last.ckpt` says is done is in the
    other two, wherever the process ends.

    Setting `interrupted` ends the training before its next step, where nothing is half done: weights, average,
    schedule and counters are those of the step before.
    """

    def __init__(self, folder: Path, description: Description, recipe: dict[str, Any]) -> None:
        self.folder, self.description, self.recipe = folder, description, recipe
        self.curve: list[dict[str, float]] = []
        self.interrupted = False
        # of the epoch in work, in all processes that worked on it
        self._seconds = 0.0
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = list(state_dict["curve"])
        self._seconds = state_dict.get("seconds", 0.0)  # earlier states have none

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def _spend(self) -> float:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        return self._seconds

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet_recipe"] = self.recipe

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.interrupted:
            # before the first step there is nothing to keep
            if trainer.global_step > 0:
                self._spend()
                self._write(trainer, module)
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.curve.append({"epoch": trainer.current_epoch, "seconds": round(self._spend(), 3), **row})
        self._seconds = 0.0
        if trainer.is_global_zero:
            part = self.folder / "metrics.json.part"
            part.write_text(json.dumps(self.curve, indent=1) + "\n")
            os.replace(part, self.folder / "metrics.json")
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            model = module.weights
            assert isinstance(model, RepLKNet)
            save_model(model, self.folder / "model.safetensors", self.description)
        part = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / "last.ckpt")
