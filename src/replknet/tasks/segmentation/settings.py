"""The options of segmentation for `replknet predict` and `eval`; they need no torch."""

from dataclasses import dataclass
from typing import Literal

from replknet.train.recipe import check_sides

# factor on the size of an image
LARGEST_RATIO = 64


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Settings of the prediction.

    Args:
        window: side of the sliding windows, pixels; the network's own by default.
        stride: distance from one window to the next, pixels; the network's own, or two thirds of --window, by default.
    """

    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        check_sides(self, "window", "stride")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Args:
        dataset: data set of a segmentation network: "ade20k", "cityscapes", or "masks" for images/, annotations/ and
            classes.json.
        split: split of the data to score.
        window: side of the sliding windows, pixels; the network's own by default.
        stride: distance from one window to the next, pixels; the network's own, or two thirds of --window, by default.
        ratios: factors on the image's size, such as '[1, 1.5]'; their predictions are averaged.
        flip: average with the prediction on the mirrored image.
    """

    dataset: Literal["ade20k", "cityscapes", "masks"] = "masks"
    split: Literal["train", "val", "test"] = "val"
    window: int | None = None
    stride: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        check_sides(self, "window", "stride")
        if not self.ratios or not all(0 < ratio <= LARGEST_RATIO for ratio in self.ratios):
            raise ValueError(f"ratios must be positive, and at most {LARGEST_RATIO}, got {list(self.ratios)}")
