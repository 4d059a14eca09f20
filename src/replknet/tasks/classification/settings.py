"""How a classifier is asked: options of `replknet predict`, `eval` and `export --int8`. No torch is needed for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replknet.train.recipe import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How the classes of an image are told.

    Args:
        top: classes an image.
    """

    top: int = 5


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """On what a classifier is scored, and how.

    Args:
        dataset: "cifar10" for its test images, or "folder" for val/<class>/.
        batch_size: images at a time.
        unreadable_images: that may be skipped; one more is an error.
    """

    dataset: Literal["cifar10", "folder"] = "cifar10"
    batch_size: int = 256
    unreadable_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """How a file in int8 is found and measured.

    Args:
        dataset: images with labels: "cifar10", or "folder" for train/<class>/ and val/<class>/.
        data: the folder, or where CIFAR-10 is kept.
        calibration: training images that give the ranges.
        search: other training images, on which layers are kept in float32.
        loss: right answers that may be lost, points of top-1.
        per_tensor: one scale a weight instead of one a channel, to compare.
        unreadable_images: that may be skipped; one more is an error.
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
