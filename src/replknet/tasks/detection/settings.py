"""The options of detection for `replknet predict` and `eval`; they need no torch."""

from dataclasses import dataclass
from typing import Literal

from replknet.train.recipe import check_share


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Settings of the prediction.

    Args:
        min_score: smallest score of an object to report, from 0 to 1.
    """

    min_score: float = 0.3

    def __post_init__(self) -> None:
        check_share(self, "min_score")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluation. The data is in COCO's layout.

    Args:
        split: split of the data to score.
        malformed: what to do with unusable annotations: "error" stops, "skip" leaves them out.
    """

    split: Literal["train", "val", "test"] = "val"
    malformed: Literal["error", "skip"] = "error"
