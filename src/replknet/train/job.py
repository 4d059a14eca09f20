"""What a training needs to know of a task: records that each task fills from a recipe."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import timm
from torch import Tensor, nn

from replknet.data.batches import Splits
from replknet.models import CONFIGS
from replknet.train.callbacks import Kept
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe

Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training, ready but for the Trainer.

    Args:
        module: network, loss and optimisation.
        sets: the data.
        epochs: passes over the training images.
        kept: how the network is written.
        score: name of the score that decides which epoch is best.
        score_every: epochs from one validation to the next.
        callbacks: the task's own.
    """

    module: pl.LightningModule
    sets: Splits
    epochs: int
    kept: Kept
    score: str
    score_every: int = 1
    callbacks: tuple[pl.Callback, ...] = ()


@dataclass(frozen=True)
class TrainStep:
    """A step of a training on made-up images.

    Args:
        model: the network, in training.
        x: images `[N,3,H,W]`.
        target: what its outputs are compared with.
        loss: from the three to the loss.
        average: whether the training keeps an average of the weights.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    average: bool = False


@dataclass(frozen=True)
class Train:
    """What a task knows of training.

    Args:
        job: network, data and optimisation of a recipe, with its data in a folder or archive.
        step: a step of a recipe with so many images and classes, its network untrained; None where a step on made-up
            images would tell nothing.
        refusal: why a process cannot train on so many images at once, or None.
        training_set: from the name of a preset and the recipe to its images and classes, None where they are the
            user's own.
    """

    job: Callable[[Recipe, Path | None, Hardware], Job]
    step: Callable[[Recipe, Hardware, int, int], TrainStep] | None
    refusal: Callable[[Recipe, Hardware, int], str | None]
    training_set: Callable[[str, Recipe], tuple[int | None, int | None]]


def check_unit(recipe: Recipe, unit: str) -> None:
    """Raise a ValueError where the recipe does not give its length in this unit: "epochs" or "samples"."""
    if getattr(recipe, unit) is None:
        other = "samples" if unit == "epochs" else "epochs"
        raise ValueError(f"trainings in {recipe.task} count {unit}: give {unit} and warmup_{unit}, not {other}")


def own_images(data: Path | None) -> Path:
    """The folder or archive of a recipe that trains on the user's images; a ValueError where none is named."""
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder or zip with --data")
    return data


def check_model(name: str) -> None:
    """Raise a ValueError where timm has no network of this name."""
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "`replknet info` lists ours"
        raise ValueError(f"no network is called {name!r}; {hint}")


def network_options(recipe: Recipe) -> dict[str, Any]:
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
