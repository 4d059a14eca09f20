"""Random numbers that depend only on a seed, an epoch and an image.

The images of a training therefore do not depend on the number of workers or processes, or on interruptions.
"""

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Draw(NamedTuple):
    """One image of one epoch."""

    epoch: int
    image: int


def number(*facts: int) -> int:
    """A random number of 64 bits that these numbers determine."""
    return int.from_bytes(blake2b(struct.pack(f"<{len(facts)}q", *facts), digest_size=8).digest(), "little")


def seed_all(*facts: int) -> None:
    """Seed the generators of Python, NumPy and torch, on every device, with these numbers."""
    seed = number(*facts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def order(seed: int, epoch: int, images: int) -> Tensor:
    """The images of an epoch, shuffled: `[images]`, int64."""
    generator = torch.Generator().manual_seed(number(seed, epoch) % 2**63)
    return torch.randperm(images, generator=generator)


class Drawn(Dataset[Any]):
    """A data set indexed by `Draw`; each draw transforms its image with its own random numbers.

    Args:
        dataset: item `index` is (image, label), transformed with the generators of Python, NumPy or torch. A
            data set with `draw_batch(seed, draws)` makes whole batches with it.
        seed: seed of the training.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        seed_all(self.seed, draw.epoch, draw.image)
        return self.dataset[draw.image]

    def __getitems__(self, draws: list[Draw]) -> Any:
        # torch's loaders call this with the draws of a batch
        if hasattr(self.dataset, "draw_batch"):
            return Whole(self.dataset.draw_batch(self.seed, draws))
        return [self[draw] for draw in draws]


@dataclass(frozen=True)
class Whole:
    """A complete batch, which needs no collating."""

    batch: Any


def collate(items: Any) -> Any:
    """Collate the items of `Drawn`."""
    return items.batch if isinstance(items, Whole) else torch.utils.data.default_collate(items)


class GlobalBatches:
    """Batch sampler for training: the draws of this process, batch by batch, to the end of an epoch.

    Step k takes `batch_size` images, from image k * batch_size of the epoch's order. Processes and accumulated batches
    share these images, however many there are. A last step that is not full is left out.

    Args:
        images: number of images in the data set.
        batch_size: images a step, over all processes.
        seed: seed of the training.
        rank: number of this process, from 0.
        processes: number of processes.
        accumulate: batches of one process in a step.
        start: number of steps already done.

    Raises:
        ValueError: the batch cannot be divided among processes and accumulated batches, or is larger than the data set.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        processes: int = 1,
        accumulate: int = 1,
        start: int = 0,
    ) -> None:
        if batch_size % (processes * accumulate):
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of {processes} processes times {accumulate} accumulated "
                "batches"
            )
        if images < batch_size:
            raise ValueError(f"batch_size {batch_size} is larger than the training set of {images} images")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.processes, self.accumulate = rank, processes, accumulate
        self.steps = images // batch_size
        self.epoch, self.first = divmod(start, self.steps)
        # Lightning calls set_epoch of a batch sampler's `sampler`
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, first = self.epoch, self.first
        shuffled = order(self.seed, epoch, self.images).tolist()
        mine = self.batch_size // (self.processes * self.accumulate)
        for step in range(first, self.steps):
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.processes + self.rank) * mine
                yield [Draw(epoch, image) for image in shuffled[start : start + mine]]


class EveryOnce:
    """Sampler for evaluation: every image in exactly one of the processes, in order."""

    def __init__(self, images: int, rank: int = 0, processes: int = 1) -> None:
        self._mine = range(rank, images, processes)

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


def uniforms(seed: int, draws: Sequence[Draw], count: int) -> Any:
    """Random numbers from 0 to 1 for each draw: a NumPy array `[draws, count]`, float64.

    They are the mixing function of splitmix64 (Steele, Lea and Flood 2014), applied to a counter.
    """
    keys = np.array([[draw.epoch, draw.image] for draw in draws], dtype=np.uint64)
    start = np.uint64(number(seed))
    with np.errstate(over="ignore"):
        state = _mixed(_mixed(start + keys[:, 0]) + keys[:, 1])
        bits = _mixed(state[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) / 2**53


def _mixed(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
