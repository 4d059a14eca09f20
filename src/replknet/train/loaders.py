"""The data of a recipe for Lightning: the images of each process, and their order."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from replknet.data import images
from replknet.data.batches import Splits, leave_interrupts_to_the_parent
from replknet.data.sampling import Drawn, EveryOnce, GlobalBatches, collate
from replknet.train.recipe import Recipe


class Batches(pl.LightningDataModule):
    """Both splits for Lightning. In training a process gets its share of each step; validation has every image once.

    Args:
        sets: the data.
        recipe: has batch size, seed and workers.
        accumulate: number of batches that a process accumulates in a step.
        start: number of steps already done.
    """

    def __init__(self, sets: Splits, recipe: Recipe, accumulate: int, start: int) -> None:
        super().__init__()
        self.sets, self.recipe, self.accumulate, self.start = sets, recipe, accumulate, start

    def train_dataloader(self) -> DataLoader[Any]:
        draws = self._draws(self.start)
        drawn = Drawn(self.sets.train, self.recipe.seed)
        return self._loader(drawn, batch_sampler=draws, collate_fn=self.sets.collate or collate)

    def first(self, count: int) -> Iterator[Any]:
        """The first batches of this process in the current epoch."""
        assert self.trainer is not None
        draws = self._draws(0)
        draws.set_epoch(self.trainer.current_epoch)
        drawn = Drawn(self.sets.train, self.recipe.seed)
        for batch in islice(draws, count):
            yield (self.sets.collate or collate)(drawn.__getitems__(batch))

    def _draws(self, start: int) -> GlobalBatches:
        assert self.trainer is not None
        return GlobalBatches(
            len(self.sets.train),
            self.recipe.batch_size,
            self.recipe.seed,
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
            accumulate=self.accumulate,
            start=start,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        mine = EveryOnce(len(self.sets.val), self.trainer.global_rank, self.trainer.world_size)
        batch = self.sets.val_batch or max(1, 2 * self.recipe.batch_size // (self.trainer.world_size * self.accumulate))
        return self._loader(
            self.sets.val, batch_size=batch, sampler=mine, collate_fn=self.sets.collate or images.present
        )

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        workers = self.recipe.workers
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=leave_interrupts_to_the_parent,
            **options,
        )
