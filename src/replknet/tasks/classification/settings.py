"""The options of classification for `replknet predict`, `eval` and `export --int8`; they need no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replknet.train.recipe import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Settings of the prediction.

    Args:
        top: number of classes to name for each image.
    """

    top: int = 5

    def __post_init__(self) -> None:
        check_positive(self, "top")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluation.

    Args:
        dataset: data set of a classifier: "cifar10" for its test images, or "folder" for images in val/<class>/.
        batch_size: number of images that the network computes at once.
        unreadable_images: number of unreadable images that are named and skipped; one more is an error.
    """

    dataset: Literal["cifar10", "folder"] = "cifar10"
    batch_size: int = 256
    unreadable_images: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        check_not_negative(self, "unreadable_images")


@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """Settings of the search for a file in int8.

    Args:
        dataset: images for --int8: "cifar10", or "folder" for train/<class>/ and val/<class>/.
        data: folder of the images for --int8, or the folder that keeps CIFAR-10.
        calibration: number of training images that give the ranges of int8.
        search: number of other training images that decide which layers stay in float32.
        loss: right answers that int8 may lose on the images of the search, points of top-1.
        per_tensor: one int8 scale for each weight instead of one for each channel, for comparison.
        unreadable_images: number of unreadable images that are named and skipped; one more is an error.
    """

    dataset: Literal["cifar10", "folder"] = "cifar10"
    data: Path | None = None
    calibration: int = 512
    search: int = 4096
    loss: float = 0.5
    per_tensor: bool = False
    unreadable_images: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "calibration", "search")
        check_not_negative(self, "loss", "unreadable_images")
