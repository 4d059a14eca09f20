"""Progress of a training: a bar or lines for people, and tables for programs."""

import csv
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from torch.utils.tensorboard import SummaryWriter

from replknet.reading import Kind, reading
from replknet.train.callbacks import scores_of
from replknet.train.state import StateError

_TABLE = "steps.csv"
_KIND = Kind(StateError, "the table of a training's steps", "move it away, and the training goes on with a new one")
# from this share of waiting on, the training suggests more workers
_MUCH_WAITING = 0.3


@dataclass(frozen=True)
class Row:
    """A row of `steps.csv`, about the steps since the row before."""

    step: int  # steps done
    epoch: float  # epochs done
    loss: float  # loss of the last batch of this process
    lr: float
    images_per_second: float  # over all processes, without the time of validation and of writing states
    waiting: float  # share of the time spent waiting for images, 0 to 1
    seconds_left: float  # to the end of the training, validation included

    def __str__(self) -> str:
        return (
            f"step {self.step}  epoch {self.epoch:.2f}  loss {self.loss:.4f}  lr {self.lr:.2e}  "
            f"{self.images_per_second:.0f} images/s, {self.waiting:.0%} waiting for images  "
            f"{_spoken(self.seconds_left)} left"
        )


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `steps.csv` in the folder of a training; none if there is no such file.

    Raises:
        StateError: it is no such table.
    """
    table = folder / _TABLE
    if not table.exists():
        return []
    names = {field.name for field in fields(Row)}
    with reading(table, _KIND), table.open(newline="") as file:
        # drop a last row that was cut short: it lacks a value
        rows = [row for row in csv.DictReader(file, strict=True) if None not in row.values()]
        for row in rows:
            if not set(row) <= names:
                raise ValueError(f"it has a column {next(name for name in row if name not in names)!r}")
            if int(row["step"]) < 0:
                raise ValueError(f"a step must not be negative, got {row['step']}")
    return rows


class Progress(pl.Callback):
    """Write `steps.csv` and TensorBoard's events, and tell the progress on stderr.

    Every `every` steps a row goes to both files, and to stderr if `lines` is set. A resumed training first drops the
    rows after the step that it resumes from.

    Args:
        folder: folder of `steps.csv` and `tensorboard/`.
        batch_size: number of images in a step, over all processes.
        every: number of steps from one row to the next.
        lines: whether to write rows to stderr, too.
    """

    def __init__(self, folder: Path, batch_size: int, every: int, lines: bool) -> None:
        self.folder, self.batch_size, self.every, self.lines = folder, batch_size, every, lines
        self.row: Row | None = None
        self._writer: SummaryWriter | None = None
        self._steps = self._epoch_steps = 0
        self._stepping = self._waiting = self._epoch_stepping = self._epoch_waiting = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # an epoch that a resumed training continues has no on_train_epoch_start
        self._started = self._since = time.perf_counter()
        self._first = trainer.global_step
        if not trainer.is_global_zero:
            return
        kept = [row for row in read_rows(self.folder) if int(row["step"]) <= trainer.global_step]
        part = self.folder / f"{_TABLE}.part"
        with part.open("w", newline="") as file:
            table = csv.DictWriter(file, [field.name for field in fields(Row)])
            table.writeheader()
            table.writerows(kept)
        os.replace(part, self.folder / _TABLE)
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.global_step + 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._waiting += self._lap()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepping += self._lap()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        if trainer.global_step % self.every == 0:
            self._tell(trainer, module)
            self._since = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        spent, self._since = now - self._since, now
        return spent

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        spent, done = self._stepping + self._waiting, trainer.global_step
        total = int(trainer.estimated_stepping_batches)
        pace = (time.perf_counter() - self._started) / (done - self._first)
        self.row = Row(
            step=done,
            epoch=round(done * trainer.max_epochs / total, 4),  # type: ignore[operator]  # every recipe sets it
            loss=float(module.last_loss),  # type: ignore[arg-type]  # a tensor in every task's module
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            images_per_second=round(self._steps * self.batch_size / spent, 1),
            waiting=round(self._waiting / spent, 4),
            seconds_left=round(pace * (total - done), 1),
        )
        self._close_interval()
        if self._writer is None:
            return
        with (self.folder / _TABLE).open("a", newline="") as file:
            csv.writer(file).writerow(asdict(self.row).values())
        for name in ("loss", "lr", "images_per_second", "waiting"):
            self._writer.add_scalar(name, getattr(self.row, name), done)
        if self.lines:
            print(self.row, file=sys.stderr, flush=True)

    def _close_interval(self) -> None:
        self._epoch_steps += self._steps
        self._epoch_stepping += self._stepping
        self._epoch_waiting += self._waiting
        self._steps, self._stepping, self._waiting = 0, 0.0, 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close_interval()
        waiting = self._epoch_waiting / max(1e-9, self._epoch_stepping + self._epoch_waiting)
        steps, self._epoch_steps = self._epoch_steps, 0
        self._epoch_stepping = self._epoch_waiting = 0.0
        if self._writer is None:
            return
        scores = scores_of(trainer)
        for name, value in scores.items():
            self._writer.add_scalar(name, value, trainer.global_step)
        self._writer.flush()
        if self.lines:
            told = "".join(f"  {name} {value:.4f}" for name, value in scores.items())
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{told}", file=sys.stderr, flush=True)
        # a few steps would say little
        if waiting > _MUCH_WAITING and steps >= 50:
            print(
                f"{waiting:.0%} of this epoch's training time went to waiting for images; more --workers may help",
                file=sys.stderr,
                flush=True,
            )

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.close()


class Bar(TQDMProgressBar):
    """Lightning's bar of an epoch, with the speed in images/s and the time left for the whole training."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = super().get_metrics(trainer, module)
        row = self._progress.row
        if row is not None:
            items |= {"images/s": round(row.images_per_second), "left": _spoken(row.seconds_left)}
        return items


def _spoken(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
