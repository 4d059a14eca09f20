"""Transforms of an image together with its mask, as in mmsegmentation 0.x's configurations for RepLKNet.

torchvision's transform distorts the colours, with the ranges of mmsegmentation. One thing differs: torchvision
multiplies the brightness, mmsegmentation adds to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from replknet.data.masks import IGNORE

# ranges of brightness, contrast, saturation and hue
DISTORTION = v2.RandomPhotometricDistort((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05))
_TRIES = 10


@dataclass(frozen=True)
class Normalize:
    """An image `[3,H,W]`, uint8, as normalised float32; mean and std are per channel, for values from 0 to 1."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor) -> Tensor:
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(self.mean), list(self.std))


def fitted(height: int, width: int, long: float, short: float) -> tuple[int, int]:
    """The largest (height, width) in these proportions with sides of at most `long` and `short`, and at least 1."""
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class ForTraining:
    """Random size, crop, flip and distortion of the colours. A small image is padded with 0, its mask with IGNORE.

    Args:
        crop: (height, width) of the result, pixels.
        scale: (longer, shorter) side that an image is fitted into, pixels, before the ratio; None: its own size.
        ratio: smallest and largest random factor of the size.
        normalize: the last step of the image.
        largest_share: a crop is drawn again if one class has this share of its labelled pixels or more, up to ten
            draws. 1 takes any crop.
        distort: whether to distort the colours.
    """

    crop: tuple[int, int]
    scale: tuple[int, int] | None
    ratio: tuple[float, float]
    normalize: Normalize
    largest_share: float = 0.75
    distort: bool = True

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = mask.shape
        factor = torch.empty(()).uniform_(*self.ratio).item()
        long, short = self.scale or (max(height, width), min(height, width))
        size = list(fitted(height, width, int(long * factor + 0.5), int(short * factor + 0.5)))
        image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=False)
        mask = F.resize(mask[None], size, InterpolationMode.NEAREST)[0]
        image, mask = self._cropped(image, mask)
        if torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        if self.distort:
            image = DISTORTION(image)
        image = self.normalize(image)
        right, below = self.crop[1] - mask.shape[1], self.crop[0] - mask.shape[0]
        return F.pad(image, [0, 0, right, below]), F.pad(mask[None], [0, 0, right, below], fill=IGNORE)[0]

    def _cropped(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = (min(a, b) for a, b in zip(self.crop, mask.shape, strict=True))
        for _ in range(_TRIES):
            top = int(torch.randint(mask.shape[0] - height + 1, ()))
            left = int(torch.randint(mask.shape[1] - width + 1, ()))
            part = mask[top : top + height, left : left + width]
            counts = torch.bincount(part.flatten().int(), minlength=IGNORE + 1)[:IGNORE]
            if self.largest_share >= 1 or counts.max() < self.largest_share * counts.sum():
                break
        return image[:, top : top + height, left : left + width], part


@dataclass(frozen=True)
class ForEvaluation:
    """Image and mask at their own size; the caller of the network fits the image into its scale.

    Args:
        normalize: the only step of the image.
    """

    normalize: Normalize

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.normalize(image), mask
