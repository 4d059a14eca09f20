"""The data of a classifier's recipe, ready for training and for evaluation."""

from pathlib import Path
from typing import Any

from replknet.data import cifar10, images, transforms
from replknet.data.batches import Splits
from replknet.models import Description
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe

_CROP_PCT = 0.875


def splits(recipe: Recipe, data: Path | None) -> Splits:
    """Both splits of the recipe's data set.

    Args:
        recipe: names the data set and its augmentation.
        data: the folder of the images; for CIFAR-10 where it is kept, by default in the cache.

    Raises:
        ValueError: images in a folder are asked for without the folder, or an augmentation that the data set lacks.
        ImageError, DownloadError: the data cannot be had.
    """
    options = recipe.options
    assert isinstance(options, ClassificationOptions)
    if options.dataset == "cifar10":
        return _cifar10(options, data)
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder with --data DIR")
    mean, std = transforms.NORMALIZATIONS[recipe.normalization]
    size = options.image_size
    moved = transforms.train_transform(
        size, mean, std, options.auto_augment, options.random_erasing, options.color_jitter
    )
    train = images.ImageSet(images.source_of(data, "train"), moved, options.unreadable_images, replace=True)
    val: Any = None
    if recipe.evaluate:
        still = transforms.eval_transform(size, mean, std, _CROP_PCT)
        val = images.ImageSet(images.source_of(data, "val"), still, options.unreadable_images)
        if train.classes != val.classes:
            raise images.ImageError(
                f"train and val in {data} must have the same classes; only one of them has "
                f"{', '.join(sorted(set(train.classes) ^ set(val.classes)))}"
            )
    return Splits(train, val, tuple(train.classes), mean, std, _CROP_PCT)


def _cifar10(options: ClassificationOptions, data: Path | None) -> Splits:
    if options.auto_augment is not None:
        raise ValueError("auto_augment is for images in folders; cifar10 has crop_padding and random_erasing")
    size, arrays = options.image_size, cifar10.load(data)
    still = transforms.small_image_transform(size, cifar10.MEAN, cifar10.STD)
    return Splits(
        train=cifar10.Moved(arrays, size, options.crop_padding, options.random_erasing),
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
