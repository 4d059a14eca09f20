"""The data of a recipe, ready for training and for evaluation."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from replknet.data import cifar10, images, transforms
from replknet.data.sampling import Drawn, EveryOnce, GlobalBatches, collate
from replknet.models import Description
from replknet.tasks.recipes import AnyRecipe, Recipe

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD),
    "cifar10": (cifar10.MEAN, cifar10.STD),
    "inception": (transforms.INCEPTION_MEAN, transforms.INCEPTION_STD),
}
_CROP_PCT = 0.875


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


def splits(recipe: Recipe, data: Path | None) -> Splits:
    """Both splits of the recipe's data set.

    Args:
        recipe: names the data set and its augmentation.
        data: the folder of the images; for CIFAR-10 where it is kept, by default in the cache.

    Raises:
        ValueError: images in a folder are asked for without the folder, or an augmentation that the data set lacks.
        ImageError, DownloadError: the data cannot be had.
    """
    if recipe.dataset == "cifar10":
        return _cifar10(recipe, data)
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder with --data DIR")
    mean, std = NORMALIZATIONS[recipe.normalization]
    size = recipe.image_size
    moved = transforms.train_transform(size, mean, std, recipe.auto_augment, recipe.random_erasing, recipe.color_jitter)
    train = images.ImageSet(images.source_of(data, "train"), moved, recipe.unreadable_images, replace=True)
    val: Any = None
    if recipe.evaluate:
        still = transforms.eval_transform(size, mean, std, _CROP_PCT)
        val = images.ImageSet(images.source_of(data, "val"), still, recipe.unreadable_images)
        if train.classes != val.classes:
            raise images.ImageError(
                f"train and val in {data} must have the same classes; only one of them has "
                f"{', '.join(sorted(set(train.classes) ^ set(val.classes)))}"
            )
    return Splits(train, val, tuple(train.classes), mean, std, _CROP_PCT)


def _cifar10(recipe: Recipe, data: Path | None) -> Splits:
    if recipe.auto_augment is not None:
        raise ValueError("auto_augment is for images in folders; cifar10 has crop_padding and random_erasing")
    size, arrays = recipe.image_size, cifar10.load(data)
    still = transforms.small_image_transform(size, cifar10.MEAN, cifar10.STD)
    return Splits(
        train=cifar10.Moved(arrays, size, recipe.crop_padding, recipe.random_erasing),
        val=cifar10.CIFAR10(arrays, False, still),
        classes=cifar10.CLASSES,
        mean=cifar10.MEAN,
        std=cifar10.STD,
        crop_pct=1.0,
    )


def evaluation_set(name: str, data: Path | None, description: Description, unreadable: int = 0) -> Any:
    """The data set on which a trained network is scored, prepared as its description says.

    Args:
        name: "cifar10" for its test split, or "folder" for val/<class>/ below `data`.
        data: the folder.
        description: image size, mean and std of the network.
        unreadable: images of a folder that may be skipped, because they cannot be read.
    """
    size, mean, std = description.image_size, description.mean, description.std
    if name == "cifar10":
        return cifar10.CIFAR10(cifar10.load(data), False, transforms.small_image_transform(size, mean, std))
    if data is None:
        raise ValueError("name the folder of the images with --data DIR")
    still = transforms.eval_transform(size, mean, std, description.crop_pct)
    return images.ImageSet(images.source_of(data, "val"), still, unreadable)


def batches(
    dataset: Any, batch_size: int, workers: int = 0, collate: Callable[[Any], Any] = images.present
) -> DataLoader[Any]:
    """A loader for evaluation: every image once, in order."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        worker_init_fn=_leave_interrupts_to_the_parent,
        collate_fn=collate,
    )


class Batches(pl.LightningDataModule):
    """Both splits for Lightning: what each process gets in training, and every image once in validation.

    Args:
        sets: the data.
        recipe: batch size, seed and workers.
        accumulate: batches of a process that make a step.
        start: steps of the training that are done.
    """

    def __init__(self, sets: Splits, recipe: AnyRecipe, accumulate: int, start: int) -> None:
        super().__init__()
        self.sets, self.recipe, self.accumulate, self.start = sets, recipe, accumulate, start

    def train_dataloader(self) -> DataLoader[Any]:
        draws = self._draws(self.start)
        drawn = Drawn(self.sets.train, self.recipe.seed)
        return self._loader(drawn, batch_sampler=draws, collate_fn=self.sets.collate or collate)

    def first(self, count: int) -> Iterator[Any]:
        """The first batches of the epoch in work, of this process."""
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
            worker_init_fn=_leave_interrupts_to_the_parent,
            **options,
        )


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """A terminal sends Ctrl-C to workers as well, and a training that ends its step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
