"""Transforms of an image before the network, put together from timm's and torchvision's."""

from collections.abc import Callable, Sequence
from typing import Any

import timm  # noqa: F401  # first as a whole, as in replknet.models
import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    create_transform,
)
from torchvision.transforms import InterpolationMode, v2

from replknet.data import cifar10
from replknet.models.replknet import evaluation_crop
from replknet.reading import Kind, reading

IMAGENET_MEAN: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
IMAGENET_STD: tuple[float, ...] = IMAGENET_DEFAULT_STD
INCEPTION_MEAN: tuple[float, ...] = IMAGENET_INCEPTION_MEAN
INCEPTION_STD: tuple[float, ...] = IMAGENET_INCEPTION_STD


class AugmentationError(ValueError):
    """timm knows no such augmentation. The text says what came and what it may be."""


# mean and std of the pixels by name, per channel, for values from 0 to 1
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": (cifar10.MEAN, cifar10.STD),
    "inception": (INCEPTION_MEAN, INCEPTION_STD),
}


_AUGMENTATION = Kind(
    AugmentationError, "an augmentation of timm's", "give one such as rand-m9-mstd0.5-inc1, or null for none"
)
# longest side of an image that the centre is cropped from, in shorter sides
_LONGEST = 32


def small_image_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Any]:
    """For images that have the network's size: normalisation alone.

    Args:
        size: side of the images, pixels; PIL images and tensors of another size are resized.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
    """
    steps: list[Any] = [v2.ToImage(), v2.Resize((size, size), InterpolationMode.BICUBIC)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return v2.Compose(steps)


def train_transform(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    color_jitter: float = 0.4,
) -> Callable[[Any], Any]:
    """timm's training transform for PIL images: random resized crop, flip, augmentation, random erasing.

    Raises:
        AugmentationError: timm does not know `auto_augment`.
    """
    with reading(f"auto_augment={auto_augment}", _AUGMENTATION):
        return create_transform(
            size,
            is_training=True,
            auto_augment=auto_augment,
            color_jitter=color_jitter,
            re_prob=random_erasing,
            re_mode="pixel",
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
        )


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float], crop_pct: float) -> Callable[[Any], Any]:
    """The official evaluation of a classifier: fitted into the size as `evaluation_crop` says, and normalised."""
    crop_mode, crop_pct = evaluation_crop(size, crop_pct)
    transform = create_transform(
        size,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    if crop_mode == "center":
        transform.transforms.insert(0, _shortened)
    return transform


def _shortened(image: Any) -> Any:
    """The middle of a very long image: when its short side has the network's size, it would take gigabytes."""
    height, width = v2.functional.get_size(image)
    longest = _LONGEST * min(height, width)
    if max(height, width) <= longest:
        return image
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
