"""Records that each task fills from a recipe, so that training knows no task by name."""

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
    """A training that only lacks the Trainer.

    Args:
        module: network, loss and optimisation.
        sets: the data.
        epochs: number of passes over the training images.
        kept: how the network is written.
        score: name of the score that decides which epoch is best.
        score_every: number of epochs from one validation to the next.
        callbacks: callbacks of the task.
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
        model: the network, in training mode.
        x: images `[N,3,H,W]`.
        target: target of the loss.
        loss: maps model, x and target to the loss.
        average: whether the training keeps an average of the weights.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    average: bool = False


@dataclass(frozen=True)
class Train:
    """The training of a task.

    Args:
        job: maps recipe, data folder or archive, and hardware to the job.
        step: maps recipe, hardware, and numbers of images and classes to a step with an untrained network. None if a
            step on made-up images tells nothing about memory.
        refusal: maps recipe, hardware and a number of images to the reason why a process cannot train on that number
            at once, or None.
        training_set: maps the name of a preset and the recipe to the numbers of training images and classes; None for
            numbers that depend on the user's data.
    """

    job: Callable[[Recipe, Path | None, Hardware], Job]
    step: Callable[[Recipe, Hardware, int, int], TrainStep] | None
    refusal: Callable[[Recipe, Hardware, int], str | None]
    training_set: Callable[[str, Recipe], tuple[int | None, int | None]]


def check_unit(recipe: Recipe, unit: str) -> None:
    """Raise a ValueError if the recipe does not count its length in this unit: "epochs" or "samples"."""
    if getattr(recipe, unit) is None:
        other = "samples" if unit == "epochs" else "epochs"
        raise ValueError(f"trainings in {recipe.task} count {unit}: give {unit} and warmup_{unit}, not {other}")


def own_images(data: Path | None) -> Path:
    """The folder or archive for a recipe that trains on the user's images; a ValueError if it is None."""
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder or zip with --data")
    return data


def check_model(name: str) -> None:
    """Raise a ValueError if timm has no network of this name."""
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "`replknet info` lists ours"
        raise ValueError(f"no network is called {name!r}; {hint}")


def network_options(recipe: Recipe) -> dict[str, Any]:
    """Options of the recipe's network, from its `kernels` and `network`.

    If the recipe gives kernels, a RepLKNet gets a small branch of 3x3, or none if a kernel is 3x3 itself. `network`
    overrides this.
    """
    options: dict[str, Any] = {}
    if recipe.kernels is not None:
        options["kernels"] = recipe.kernels
        if recipe.model in CONFIGS:
            options["small_kernel"] = 3 if min(recipe.kernels) > 3 else None
    return options | (recipe.network or {})


def built(build: Callable[..., Built], name: str, options: dict[str, Any]) -> Built:
    """The result of `build(**options)`.

    Raises:
        ValueError: an option is unknown, or the network cannot have its value.
    """
    try:
        return build(**options)
    except (TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error
