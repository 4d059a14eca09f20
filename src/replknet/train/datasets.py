"""The data of a recipe, ready for training and for evaluation."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from replknet.data import cifar10, images, transforms
from replknet.models import Description
from replknet.recipes import Recipe

# whether images that come from a folder have the statistics of ImageNet is up to their owner
_FOLDER = (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
_CROP_PCT = 0.875


@dataclass(frozen=True)
class Splits:
    """Training and evaluation data, and how the images were prepared."""

    train: Any
    val: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


def splits(recipe: Recipe, data: Path | None) -> Splits:
    """Both splits of the recipe's data set.

    Args:
        recipe: names the data set and its augmentation.
        data: the folder of the images; for CIFAR-10 where it is kept, by default in the cache.

    Raises:
        ValueError: images in a folder are asked for without the folder.
        ImageError, DownloadError: the data cannot be had.
    """
    size = recipe.image_size
    if recipe.dataset == "cifar10":
        arrays = cifar10.load(data)
        still = transforms.small_image_transform(size, cifar10.MEAN, cifar10.STD)
        moved = transforms.small_image_transform(size, cifar10.MEAN, cifar10.STD, recipe.crop_padding)
        train, val = cifar10.CIFAR10(arrays, True, moved), cifar10.CIFAR10(arrays, False, still)
        return Splits(train, val, cifar10.CLASSES, cifar10.MEAN, cifar10.STD, 1.0)
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder with --data DIR")
    mean, std = _FOLDER
    moved = transforms.train_transform(size, mean, std, recipe.auto_augment, recipe.random_erasing)
    train = images.image_folder(data, "train", moved)
    val = images.image_folder(data, "val", transforms.eval_transform(size, mean, std, _CROP_PCT))
    if train.classes != val.classes:
        raise images.ImageError(
            f"train and val in {data} must have the same classes; only one of them has "
            f"{', '.join(sorted(set(train.classes) ^ set(val.classes)))}"
        )
    return Splits(train, val, tuple(train.classes), mean, std, _CROP_PCT)


def evaluation_set(name: str, data: Path | None, description: Description) -> Any:
    """The data set on which a trained network is scored, prepared as its description says.

    Args:
        name: "cifar10" for its test split, or "folder" for val/<class>/ below `data`.
        data: the folder.
        description: image size, mean and std of the network.
    """
    size, mean, std = description.image_size, description.mean, description.std
    if name == "cifar10":
        return cifar10.CIFAR10(cifar10.load(data), False, transforms.small_image_transform(size, mean, std))
    if data is None:
        raise ValueError("name the folder of the images with --data DIR")
    return images.image_folder(data, "val", transforms.eval_transform(size, mean, std, description.crop_pct))


def batches(dataset: Any, batch_size: int, *, train: bool = False, workers: int = 0) -> DataLoader[Any]:
    """A loader; in training it shuffles and leaves out a last batch that is not full."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train and len(dataset) > batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """A terminal sends Ctrl-C to workers as well, and a training that ends its step still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
