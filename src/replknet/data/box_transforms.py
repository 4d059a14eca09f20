"""Transforms of an image together with its objects, as in mmdetection's configurations for RepLKNet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from replknet.data.coco import CocoImages
from replknet.data.images import pixels
from replknet.data.mask_transforms import DISTORTION, Normalize, fitted

Targets = dict[str, Tensor]

# shortest and longest side of DETR's random crops, pixels
_SMALLEST_CROP, _LARGEST_CROP = 384, 600
# pixels; a box with a shorter side is dropped
_SHORTEST = 1e-3


@dataclass(frozen=True)
class ForTraining:
    """Random flip, crop and size. Boxes are clipped to the new image; boxes outside it are dropped.

    The area of a target scales with the area of its box. Random numbers come from torch's generator.

    Args:
        scales: (longer, shorter) sides that an image is fitted into, pixels; one pair is drawn.
        normalize: the last step of the image.
        crop_scales: as in DETR, half of the images are first fitted into one of these scales and cropped. The crop is a
            random rectangle with sides from 384 to 600 pixels; it may have no object. Empty: no crops.
        flip: share of the images that are mirrored.
        distort: whether to distort the colours.

    Raises:
        ValueError: there are no scales, or a scale is not (longer, shorter) with positive sides.
    """

    scales: Sequence[tuple[int, int]]
    normalize: Normalize
    crop_scales: Sequence[tuple[int, int]] = ()
    flip: float = 0.5
    distort: bool = False

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales must have at least one (longer, shorter) side, got none")
        for scale in (*self.scales, *self.crop_scales):
            _check(scale)

    def __call__(self, image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """The image `[3,H,W]`, uint8, as float32 `[3,H',W']`, and its targets.

        Args:
            image: the image as read from its file.
            targets: `boxes` `[n,4]` (x1, y1, x2, y2), `labels`, `crowd`, `area` `[n]`, and optionally `masks`
                `[n,H,W]`.
        """
        before = _areas(targets["boxes"])
        if torch.rand(()) < self.flip:
            image, targets = _flipped(image, targets)
        if self.crop_scales and torch.rand(()) < 0.5:
            image, targets = _resized(image, targets, _drawn(self.crop_scales))
            image, targets = _cropped(image, targets)
        image, targets = _resized(image, targets, _drawn(self.scales))
        if self.distort:
            image = DISTORTION(image)
        targets = {**targets, "boxes": _clipped(targets["boxes"], image.shape[-2], image.shape[-1])}
        sides = targets["boxes"][:, 2:] - targets["boxes"][:, :2]
        targets["area"] = targets["area"] * _areas(targets["boxes"]) / before
        keep = (sides >= _SHORTEST).all(1)
        return self.normalize(image), {key: value[keep] for key, value in targets.items()}


@dataclass(frozen=True)
class ForEvaluation:
    """Fit an image into a scale. Targets keep the pixels of the original image, since scores are computed there.

    `rescaled` brings predictions back to the original size.

    Args:
        scale: (longer, shorter) side that the image is fitted into, pixels.
        normalize: the last step of the image.

    Raises:
        ValueError: the scale is not (longer, shorter) with positive sides.
    """

    scale: tuple[int, int]
    normalize: Normalize

    def __post_init__(self) -> None:
        _check(self.scale)

    def __call__(self, image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """The image `[3,H,W]`, uint8, as float32 `[3,H',W']`, and its targets unchanged."""
        return self.normalize(_fitted_image(image, self.scale)), targets


def rescaled(prediction: Targets, from_size: tuple[int, int], to_size: tuple[int, int]) -> Targets:
    """Convert predicted boxes and masks from one size of an image to another.

    Args:
        prediction: `boxes` `[n,4]` (x1, y1, x2, y2), optionally `masks` `[n,H,W]`, probabilities. Other entries stay
            unchanged.
        from_size: (height, width) that the network saw, without the padding of a batch.
        to_size: (height, width) of the result.

    Returns:
        A new dict: boxes multiplied, masks `[n,*to_size]` interpolated bilinearly.

    Raises:
        ValueError: the masks do not have the size `from_size`.
    """
    result = {**prediction, "boxes": _scaled(prediction["boxes"], from_size, to_size)}
    masks = prediction.get("masks")
    if masks is None:
        return result
    if tuple(masks.shape[-2:]) != tuple(from_size):
        raise ValueError(f"masks must be of the size that boxes are scaled from, {from_size}, got {list(masks.shape)}")
    if tuple(from_size) != tuple(to_size):
        result["masks"] = torch.nn.functional.interpolate(masks[:, None], to_size, mode="bilinear")[:, 0]
    return result


class BoxSet(Dataset[Any]):
    """Images and their objects, transformed together.

    Args:
        images: images with their targets.
        transform: maps an image `[3,H,W]`, uint8, and its targets to the network's input and new targets.

    An item is (image, targets). The targets also have `image_id` `[]`, int64, and `size` `[2]`, int64: (height, width)
    of the original image.
    """

    def __init__(self, images: CocoImages, transform: Callable[[Tensor, Targets], tuple[Tensor, Targets]]) -> None:
        self.images, self.transform = images, transform
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        image, targets = self.images[index]
        x, targets = self.transform(pixels(image), targets)
        facts = {"image_id": torch.tensor(self.images.image_ids[index]), "size": self.images.sizes[index].clone()}
        return x, {**targets, **facts}


def listed(items: Sequence[tuple[Tensor, Targets]]) -> tuple[list[Tensor], list[Targets]]:
    """Collate a batch of images of different sizes and their targets into two lists."""
    return [image for image, _ in items], [targets for _, targets in items]


def _check(scale: tuple[int, int]) -> None:
    if not scale[0] >= scale[1] > 0:
        raise ValueError(f"a scale must be (longer side, shorter side) in pixels, got {tuple(scale)}")


def _drawn(scales: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return scales[int(torch.randint(len(scales), ()))]


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def _flipped(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    x1, y1, x2, y2 = targets["boxes"].unbind(1)
    width = image.shape[-1]
    targets = {**targets, "boxes": torch.stack([width - x2, y1, width - x1, y2], 1)}
    if "masks" in targets:
        targets["masks"] = targets["masks"].flip(-1)
    return image.flip(-1), targets


def _fitted_image(image: Tensor, scale: tuple[int, int]) -> Tensor:
    size = list(fitted(image.shape[-2], image.shape[-1], *scale))
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=False)


def _scaled(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes in pixels of the (height, width) `new`, from boxes in pixels of `old`."""
    y, x = (b / a for a, b in zip(old, new, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def _resized(image: Tensor, targets: Targets, scale: tuple[int, int]) -> tuple[Tensor, Targets]:
    resized = _fitted_image(image, scale)
    size = resized.shape[-2:]
    targets = {**targets, "boxes": _scaled(targets["boxes"], image.shape[-2:], size)}
    if "masks" in targets:
        # NEAREST would shift a mask by half a pixel against its box
        targets["masks"] = F.resize(targets["masks"], list(size), InterpolationMode.NEAREST_EXACT)
    return resized, targets


def _cropped(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """Cut out a rectangle of random sides and place; boxes outside it end with no area."""
    (top, height), (left, width) = (_cut(side) for side in image.shape[-2:])
    boxes = _clipped(targets["boxes"] - targets["boxes"].new_tensor([left, top, left, top]), height, width)
    targets = {**targets, "boxes": boxes}
    if "masks" in targets:
        targets["masks"] = targets["masks"][:, top : top + height, left : left + width]
    return image[:, top : top + height, left : left + width], targets


def _cut(side: int) -> tuple[int, int]:
    """Start and length of a random part of a side."""
    length = int(torch.randint(min(side, _SMALLEST_CROP), min(side, _LARGEST_CROP) + 1, ()))
    return int(torch.randint(side - length + 1, ())), length
