"""What `fit` needs to know of a task: classification, segmentation and detection each make one from their recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl

from replknet.models import CONFIGS
from replknet.tasks.recipes import AnyRecipe
from replknet.train.callbacks import Kept
from replknet.train.loaders import Splits

Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training, ready but for the Trainer.

    Args:
        task: network, loss and optimisation.
        sets: the data.
        epochs: passes over the training images.
        kept: how the network is written.
        score: name of the score that decides which epoch is best.
        score_every: epochs from one validation to the next.
        callbacks: the task's own.
    """

    task: pl.LightningModule
    sets: Splits
    epochs: int
    kept: Kept
    score: str
    score_every: int = 1
    callbacks: tuple[pl.Callback, ...] = ()


def network_options(recipe: AnyRecipe) -> dict[str, Any]:
    """Options of the recipe's network: its kernels, and what `network` says.

    With kernels of the recipe's own a RepLKNet has a small branch of 3, or none beside a 3x3, unless `network` says.
    """
    options: dict[str, Any] = {}
    if recipe.kernels is not None:
        options["kernels"] = recipe.kernels
        if recipe.model in CONFIGS:
            options["small_kernel"] = 3 if min(recipe.kernels) > 3 else None
    return options | (recipe.network or {})


def built(build: Callable[..., Built], name: str, options: dict[str, Any]) -> Built:
    """What `build(**options)` makes.

    Raises:
        ValueError: there is no such option.
    """
    try:
        return build(**options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error
