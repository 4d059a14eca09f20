"""Inputs of detectors: images of different sizes, and the objects in them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def batched(images: Sequence[Tensor], divisor: int = 32) -> tuple[Tensor, list[tuple[int, int]]]:
    """One batch of images of different sizes, padded with 0 on the right and at the bottom.

    Args:
        images: `[3,H,W]` each, normalised.
        divisor: the sides of the batch are multiples of it, pixels.

    Returns:
        `[N,3,H,W]` in channels_last, with the largest sides rounded up to multiples of the divisor; and (height, width)
        of each image.

    Raises:
        ValueError: there is no image, or an image is not `[3,H,W]`.
    """
    if not images:
        raise ValueError("expected at least one image, got none")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"expected images [3,H,W], got {list(image.shape)}")
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    # no -(-a // b): in ONNX, division rounds towards 0, so a traced file would round down
    height, width = ((max(sides) + divisor - 1) // divisor * divisor for sides in zip(*sizes, strict=True))
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    return torch.stack(padded).contiguous(memory_format=torch.channels_last), sizes


def objects(
    images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None, masks: bool
) -> list[dict[str, Tensor]]:
    """The objects that a detector should find in each image: no crowds, and no boxes without an area.

    Args:
        images: the images of the batch.
        targets: for each image `boxes` `[n,4]`, `labels` `[n]`, `masks` `[n,H,W]`, and optionally `crowd` `[n]` bool.
        masks: whether masks are needed.

    Returns:
        One dict an image: `boxes` in float32, `labels`, and `masks` if they are needed.

    Raises:
        ValueError: the numbers of images and targets differ, or masks are missing.
    """
    if targets is None or len(targets) != len(images):
        came = "none" if targets is None else len(targets)
        raise ValueError(f"training needs one target for each image: expected {len(images)}, got {came}")
    names = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    found = []
    for target in targets:
        missing = [name for name in names if name not in target]
        if missing:
            raise ValueError(f"expected a target with {', '.join(names)}, got one without {', '.join(missing)}")
        boxes = target["boxes"].float()
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if "crowd" in target:
            keep &= ~target["crowd"]
        found.append({name: (boxes if name == "boxes" else target[name])[keep] for name in names})
    return found
