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

IMAGENET_MEAN: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
IMAGENET_STD: tuple[float, ...] = IMAGENET_DEFAULT_STD
INCEPTION_MEAN: tuple[float, ...] = IMAGENET_INCEPTION_MEAN
INCEPTION_STD: tuple[float, ...] = IMAGENET_INCEPTION_STD

# mean and std of the pixels by name, per channel, for values from 0 to 1
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": (cifar10.MEAN, cifar10.STD),
    "inception": (INCEPTION_MEAN, INCEPTION_STD),
}


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
    """timm's training transform for PIL images: random resized crop, flip, augmentation, random erasing."""
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
    return create_transform(
        size,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
