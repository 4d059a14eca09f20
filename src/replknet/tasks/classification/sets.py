"""The data sets of classifiers, prepared for training and for evaluation."""

from pathlib import Path
from typing import Any

from replknet.data import cifar10, images, sources, transforms
from replknet.data.batches import Splits
from replknet.data.files import brief
from replknet.models import Description
from replknet.shown import shown
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe

_CROP_PCT = 0.875


def splits(recipe: Recipe, data: Path | None) -> Splits:
    """Both splits of the recipe's data set.

    Args:
        recipe: has the name of the data set and its augmentation.
        data: the folder of the images. For CIFAR-10 the folder that keeps it; the cache by default.

    Raises:
        ValueError: `data` is missing for images in a folder, or the data set lacks the augmentation.
        ImageError, DownloadError: the data cannot be read or downloaded.
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
    train = images.ImageSet(sources.source_of(data, "train"), moved, options.unreadable_images, replace=True)
    val: Any = None
    if recipe.evaluate:
        still = transforms.eval_transform(size, mean, std, _CROP_PCT)
        val = images.ImageSet(sources.source_of(data, "val"), still, options.unreadable_images)
        if train.classes != val.classes:
            other = sorted(set(train.classes) ^ set(val.classes))
            raise images.ImageError(
                f"train and val in {shown(data)} must have the same classes in the same order; only one of them has "
                f"{', '.join(map(brief, other[:5])) or 'another order'}{', ...' if len(other) > 5 else ''}"
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


def evaluation_set(
    name: str, data: Path | None, description: Description, unreadable: int = 0, training: bool = False
) -> Any:
    """The data set for the score of a trained network, prepared as the network's description says.

    Args:
        name: "cifar10" for its test split, or "folder" for val/<class>/ below `data`.
        data: the folder of the images. For CIFAR-10 the folder that keeps it; the cache by default.
        description: has image size, crop, mean and std.
        unreadable: number of unreadable images in a folder that are skipped.
        training: take the training images instead, without augmentation.
    """
    size, mean, std = description.image_size, description.mean, description.std
    if name == "cifar10":
        return cifar10.CIFAR10(cifar10.load(data), training, transforms.small_image_transform(size, mean, std))
    if data is None:
        raise ValueError("name the folder of the images with --data DIR")
    still = transforms.eval_transform(size, mean, std, description.crop_pct)
    return images.ImageSet(sources.source_of(data, "train" if training else "val"), still, unreadable)
