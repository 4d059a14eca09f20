"""How a detector is asked: options of `replknet predict` and `eval`. No torch is needed for them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Which objects of an image are told.

    Args:
        min_score: of an object, from 0 to 1.
    """

    min_score: float = 0.3


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """On what a detector is scored; the data is in COCO's layout.

    Args:
        split: of the images and annotations.
        malformed: annotations that cannot be used are an "error", or left out ("skip").
    """

    split: Literal["train", "val", "test"] = "val"
    malformed: Literal["error", "skip"] = "error"
