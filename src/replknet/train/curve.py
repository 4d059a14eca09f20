"""The curve of a training: a row for each epoch."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from replknet.train.callbacks import scores_of
from replknet.train.files import write_text


class KeepCurve(pl.Callback):
    """Write `metrics.json`: a row for each epoch, with its seconds, its mean loss and the scores.

    A resumed epoch counts all of its steps, whichever process took them and however often it was interrupted.

    Args:
        folder: where the file goes.

    Attributes:
        rows: of the epochs that are done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        # of the epoch in work, as far as `catch_up` counted it: the mean loss of all processes for each step
        self._seconds = 0.0
        self._losses: list[float] = []
        # what `catch_up` has not counted yet: the losses are of this process alone
        self._since = time.perf_counter()
        self._new: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """The name under which `last.ckpt` has the state, which earlier versions chose."""
        return "KeepLast"

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.rows, "seconds": self._seconds, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["curve"])
        # the earliest states have neither
        self._seconds = state_dict.get("seconds", 0.0)
        self._losses = list(state_dict.get("losses", []))

    def catch_up(self, trainer: pl.Trainer) -> None:
        """Count the time and the losses up to now, so that a state has them; all processes call this together.

        Args:
            trainer: puts the losses of all processes together.
        """
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        if self._new:
            self._losses += trainer.strategy.reduce(torch.stack(self._new).double()).tolist()
            self._new = []

    def last_is_best(self, score: str) -> bool:
        """Whether the last row has this score, and no row before it has as much.

        Args:
            score: name of a score, of which more is better.
        """
        *earlier, last = (row.get(score, -1.0) for row in self.rows)
        return last > max(earlier, default=-1.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module.last_loss, Tensor)
        self._new.append(module.last_loss)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.catch_up(trainer)
        # the exact sum does not depend on where the epoch was interrupted
        mean = math.fsum(self._losses) / len(self._losses)
        row = {"epoch": trainer.current_epoch, "seconds": round(self._seconds, 3), "train_loss": mean}
        self.rows.append({**row, **scores_of(trainer)})
        self._seconds, self._losses = 0.0, []
        if trainer.is_global_zero:
            write_text(self.folder / "metrics.json", json.dumps(self.rows, indent=1) + "\n")
