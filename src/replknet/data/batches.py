"""Both splits of a data set, loaders for evaluation, and what all workers that load images do."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from replknet.data import images


@dataclass(frozen=True)
class Splits:
    """Training and evaluation data, and how the images were prepared."""

    train: Any
    val: Any  # None where nothing is evaluated
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    # images at once in validation; None for twice as many as in training
    val_batch: int | None = None
    # puts items together to a batch where stacking cannot
    collate: Callable[[Any], Any] | None = None


def batches(
    dataset: Any, batch_size: int, workers: int = 0, collate: Callable[[Any], Any] = images.present
) -> DataLoader[Any]:
    """A loader for evaluation: every image once, in order."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        worker_init_fn=leave_interrupts_to_the_parent,
        collate_fn=collate,
    )


def leave_interrupts_to_the_parent(worker: int) -> None:
    """A terminal sends Ctrl-C to workers as well, and a training that ends its step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
