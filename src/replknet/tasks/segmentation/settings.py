"""How a segmentation network is asked: options of `replknet predict` and `eval`. No torch is needed for them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How a network is run on an image.

    Args:
        window: side of the windows that are taken of an image, pixels; the network's own if none is given.
        stride: from one window to the next, pixels.
    """

    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """On what a network is scored, and how it is run.

    Args:
        dataset: "ade20k", "cityscapes", or "masks" for images/, annotations/ and classes.json.
        split: of the masks.
        window: side of the windows that are taken of an image, pixels; the network's own if none is given.
        stride: from one window to the next, pixels.
        ratios: sizes of the image to average, such as '[1, 1.5]'.
        flip: average with the mirrored image.
    """

    dataset: Literal["ade20k", "cityscapes", "masks"] = "masks"
    split: Literal["train", "val", "test"] = "val"
    window: int | None = None
    stride: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
