"""What a training keeps: its last state, and the weights in files of their own."""

import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import update_bn

from replknet.data.sampling import seed_all
from replknet.kernels.malloc import give_back_fragments

# tells the random numbers of a step from those of an image
_STEP = -1


class StateError(RuntimeError):
    """A state that cannot be written or read; the text says which, why, and what is left."""


class LossError(RuntimeError):
    """A loss that is no number; the text says at which step, and where its batch is."""


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


class KeepLast(pl.Callback):
    """Write the curve, the weights and the state after each epoch, and the last two when interrupted.

    They are `metrics.json` (a row an epoch), `model.safetensors` (to use), `best.safetensors` (those of the epoch
    with the best validation accuracy) and `last.ckpt` (to go on), in this order, and files get their names only when
    they are complete: what `last.ckpt` says is done is in the others, wherever the process ends.

    Setting `interrupted` ends the training before its next step, where nothing is half done: weights, average,
    schedule and counters are those of the step before. A loss that is no number ends it, too, with the batch in
    `bad_batch.safetensors`; the states before it stay.

    Args:
        folder: where the files go.
        kept: how the network is built and written.
        recipe: what `last.ckpt` is of.
        every: steps after which the state is written within an epoch; None for after each epoch alone.
        score: name of the score that decides what is best.
    """

    def __init__(
        self, folder: Path, kept: Kept, recipe: dict[str, Any], every: int | None = None, score: str = "val_top1"
    ) -> None:
        self.folder, self.kept, self.recipe, self.every, self.score = folder, kept, recipe, every, score
        self.curve: list[dict[str, float]] = []
        self.interrupted = False
        # of the epoch in work, in all processes that worked on it
        self._seconds = 0.0
        self._since = time.perf_counter()
        # of each step: the mean of all processes where it was asked for, and since then this process's own
        self._losses: list[float] = []
        self._new: list[Tensor] = []
        self._checked: tuple[Tensor, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self._seconds, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = list(state_dict["curve"])
        # earlier states have neither
        self._seconds = state_dict.get("seconds", 0.0)
        self._losses = list(state_dict.get("losses", []))

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def _spend(self) -> float:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        return self._seconds

    def _gather_losses(self, trainer: pl.Trainer) -> None:
        if self._new:
            self._losses += trainer.strategy.reduce(torch.stack(self._new).double()).tolist()
            self._new = []

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet_recipe"] = self.recipe

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._check_loss(trainer)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        due = self.every is not None and batch_idx > 0 and trainer.global_step % self.every == 0
        # before the first step there is nothing to keep
        if trainer.global_step > 0 and (self.interrupted or due):
            self._spend()
            self._gather_losses(trainer)
            self._write(trainer, module)
        if self.interrupted:
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module.last_loss, Tensor)
        self._new.append(module.last_loss)
        # looked at one step later, so that a GPU is not waited for
        self._checked = module.last_loss, batch

    def _check_loss(self, trainer: pl.Trainer) -> None:
        if self._checked is None:
            return
        (loss, batch), self._checked = self._checked, None
        if loss.isfinite():
            return
        path = self.folder / f"bad_batch{f'_{trainer.global_rank}' if trainer.global_rank else ''}.safetensors"
        save_file({name: t.contiguous() for name, t in _tensors(batch, "")}, path)
        raise LossError(
            f"the loss of step {trainer.global_step} is {loss.item()}; its batch is in {path}, and last.ckpt, if there "
            "is one, is of a step before. A lower --lr, --clip-grad or --precision 32-true may help"
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check_loss(trainer)
        # nothing where no validation images are scored
        scored = scores_of(trainer)
        best = scored.get(self.score, -1.0) > max(
            (earlier.get(self.score, -1.0) for earlier in self.curve), default=-1.0
        )
        self._gather_losses(trainer)
        # the exact sum does not depend on where the epoch was interrupted
        mean = math.fsum(self._losses) / len(self._losses)
        seconds = round(self._spend(), 3)
        self.curve.append({"epoch": trainer.current_epoch, "seconds": seconds, "train_loss": mean, **scored})
        self._seconds, self._losses = 0.0, []
        if trainer.is_global_zero:
            part = self.folder / "metrics.json.part"
            part.write_text(json.dumps(self.curve, indent=1) + "\n")
            os.replace(part, self.folder / "metrics.json")
        self._write(trainer, module, best)

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


def _tensors(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with names: images and labels, and what is in lists and dicts by its place there."""
    if isinstance(batch, Tensor):
        yield name, batch
        return
    for key, part in batch.items() if isinstance(batch, dict) else enumerate(batch):
        # a batch itself is images and what they are compared with
        yield from _tensors(part, f"{name}.{key}" if name else ("images", "labels")[key])


def _whole(trainer: pl.Trainer, module: pl.LightningModule, kept: Kept) -> nn.Module:
    """The network to be kept; where its weights are divided among processes the first one has them, put together."""
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


def check_whole(path: Path) -> None:
    """Compare a state with the checksums in it.

    Raises:
        StateError: it is cut short or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except zipfile.BadZipFile as error:
        raise StateError(f"{path} is cut short or no state of a training ({error})") from error
    if damaged is not None:
        raise StateError(f"{path} is damaged: the checksum of {damaged} does not fit; start anew, or use a copy")
