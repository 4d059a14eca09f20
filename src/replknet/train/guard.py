"""A loss that is no number ends the training, and its batch is kept."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors.torch import save_file
from torch import Tensor


class LossError(RuntimeError):
    """A loss that is no number; the text says at which step, and where its batch is."""


class GuardLoss(pl.Callback):
    """End the training at the first loss that is no number, with its batch in `bad_batch.safetensors`.

    Each process looks at its own loss, one step later, so that no step waits for a GPU.

    Args:
        folder: where the batch goes.

    Raises:
        LossError: in the hooks, at such a loss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unchecked: tuple[Tensor, Any] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module.last_loss, Tensor)
        self._unchecked = module.last_loss, batch

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        if self._unchecked is None:
            return
        (loss, batch), self._unchecked = self._unchecked, None
        if loss.isfinite():
            return
        path = self.folder / f"bad_batch{f'_{trainer.global_rank}' if trainer.global_rank else ''}.safetensors"
        part = path.with_name(f"{path.name}.part")
        save_file({name: t.contiguous() for name, t in _tensors(batch, "")}, part)
        os.replace(part, path)
        raise LossError(
            f"the loss of step {trainer.global_step} is {loss.item()}; its batch is in {path}, and last.ckpt, if there "
            "is one, is of a step before. A lower --lr, --clip-grad or --precision 32-true may help"
        )


def _tensors(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with names: images and labels; inside lists and dicts by the place there."""
    if isinstance(batch, Tensor):
        yield name, batch
        return
    for key, part in batch.items() if isinstance(batch, dict) else enumerate(batch):
        # a batch itself is images and what they are compared with
        yield from _tensors(part, f"{name}.{key}" if name else ("images", "labels")[key])
