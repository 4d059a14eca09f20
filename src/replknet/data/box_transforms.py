"""What happens to an image and the objects in it together, as in mmdetection's configurations for RepLKNet."""

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

# sides of a crop of DETR, pixels
_SMALLEST_CROP, _LARGEST_CROP = 384, 600
# pixels; a box with a shorter side is none
_SHORTEST = 1e-3


@dataclass(frozen=True)
class ForTraining:
    """A random flip, crop and size; boxes are clipped to what is left of the image, and those outside are dropped.

    A target's area changes as its box's does. What is drawn comes from torch's generator.

    Args:
        scales: longer and shorter side that an image is fitted into, pixels; one is drawn.
        normalize: the last step of the image.
        crop_scales: as DETR does, half of the images are first fitted into one of these, and a rectangle with sides
            from 384 to 600 pixels is cut out, which may have no object; none for no crops.
        flip: share of the images that are mirrored.
        distort: whether to distort the colours.

    Raises:
        ValueError: there are no scales, or their sides are not positive and in the order (longer, shorter).
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
            image: as it was read.
            targets: `boxes` `[n,4]` (x1, y1, x2, y2), `labels`, `crowd`, `area` `[n]`, and perhaps `masks` `[n,H,W]`.
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
    """An image fitted into a scale; its targets stay those of the image as it was read, which scores are about.

    `rescaled` brings what a network predicts to the same size.

    Args:
        scale: longer and shorter side, pixels.
        normalize: the last step of the image.

    Raises:
        ValueError: the sides are not positive and in the order (longer, shorter).
    """

    scale: tuple[int, int]
    normalize: Normalize

    def __post_init__(self) -> None:
        _check(self.scale)

    def __call__(self, image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """The image `[3,H,W]`, uint8, as float32 `[3,H',W']`, and its targets as they came."""
        return self.normalize(_fitted_image(image, self.scale)), targets


def rescaled(prediction: Targets, from_size: tuple[int, int], to_size: tuple[int, int]) -> Targets:
    """Boxes and masks of an image that was resized, in pixels of another size of it.

    Args:
        prediction: `boxes` `[n,4]` (x1, y1, x2, y2), perhaps `masks` `[n,H,W]`, probabilities; all else stays.
        from_size: (height, width) that the network saw, without what fills up a batch.
        to_size: (height, width) of the result.

    Returns:
        A new dict: boxes multiplied, masks `[n,*to_size]` interpolated bilinearly.

    Raises:
        ValueError: the masks are not of `from_size`.
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
    """Images and the objects in them, transformed together.

    Args:
        images: with their targets.
        transform: from an image `[3,H,W]`, uint8, and targets to what the network gets and what it is compared with.

    An item is (image, targets). The targets have also `image_id` `[]`, int64, and `size` `[2]`, int64: (height, width)
    of the image as it was read.
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
    """For a loader: a batch of images of different sizes and their targets, as two lists."""
    return [image for image, _ in items], [targets for _, targets in items]


# ---- steps


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
    # one pixel at least, however long the image is
    size = [max(1, side) for side in fitted(image.shape[-2], image.shape[-1], *scale)]
    return F.resize(image, size, InterpolationMode.BILINEAR, antialias=False)


def _scaled(boxes: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Boxes of an image of one (height, width), in another."""
    y, x = (b / a for a, b in zip(old, new, strict=True))
    return boxes * boxes.new_tensor([x, y, x, y])


def _resized(image: Tensor, targets: Targets, scale: tuple[int, int]) -> tuple[Tensor, Targets]:
    resized = _fitted_image(image, scale)
    size = resized.shape[-2:]
    targets = {**targets, "boxes": _scaled(targets["boxes"], image.shape[-2:], size)}
    if "masks" in targets:
        # exact: the plain one shifts a mask by half a pixel against its box
        targets["masks"] = F.resize(targets["masks"], list(size), InterpolationMode.NEAREST_EXACT)
    return resized, targets


def _cropped(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """A rectangle of random sides and place; a box outside has no area then."""
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
