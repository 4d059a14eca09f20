"""What a task is: a frozen record that training, commands and exports ask, so that none of them knows a task by name.

A task is a folder with the modules `files`, `infer`, `train`, `export` and `recipes`. Each of the first four has one
record of the classes below, and is imported when it is first asked for: predictions need no Lightning, and `--help`
needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from replknet.deploy.files import Format
    from replknet.deploy.verify import Difference, Run
    from replknet.models.model_files import Source
    from replknet.train.job import Train
    from replknet.train.recipe import Options, Recipe


# wraps batches, to show progress
Shown = Callable[[Iterable[Any]], Iterable[Any]]


class Description(Protocol):
    """What a file of weights is of, and how its network wants its images."""

    @property
    def name(self) -> str:
        """timm's name of the network, or of the backbone that it stands on."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    def build(self) -> nn.Module:
        """The same network, untrained."""
        ...


@dataclass(frozen=True)
class Network:
    """A network with what is known of it.

    Args:
        task: what it does.
        model: in eval mode, on the CPU. A file that was exported is a module that runs it in its own runtime.
        description: the task's own record.
    """

    task: Task
    model: nn.Module
    description: Any


@dataclass(frozen=True)
class Prediction:
    """What a network finds in an image.

    Args:
        record: the same for programs, as JSON can hold it.
        text: for people, one line.
        draw: makes a matplotlib figure; None where there is nothing to draw.
    """

    record: dict[str, Any]
    text: str
    draw: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of a network on a data set.

    Args:
        record: for programs, as JSON can hold it.
        lines: for people.
    """

    record: dict[str, Any]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """On what two forms of a network are compared, and what of them.

    Args:
        random: images `[N,C,H,W]`.
        image: an image in RGB as the network is given it, a batch of one.
        output: what a network gives for a batch.
    """

    random: Tensor
    image: Callable[[Image], Tensor]
    output: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Files:
    """Networks of a task in files of weights.

    Args:
        load: from a file that was read to the network, in the file's form, and its description.
        save: writes a network with its description, whole or not at all.
    """

    load: Callable[[Source, torch.dtype | None], tuple[Any, Any]]
    save: Callable[[Any, str | Path, Any], None]


@dataclass(frozen=True)
class Infer:
    """Prediction and scores; without Lightning.

    Args:
        predictor: from a network and settings to a function that finds what is in an image in RGB.
        evaluate: scores a network on the data in a folder or archive; None for the task's default, if there is one.
            The last argument wraps the batches, to show progress.
        comparison: of the network's forms.
    """

    predictor: Callable[[Network, Any], Callable[[Image], Prediction]]
    evaluate: Callable[[Network, Path | None, Any, Shown], Scored]
    comparison: Callable[[Network], Comparison]


@dataclass(frozen=True)
class Int8:
    """Networks of a task in int8.

    Args:
        endings: of the files, by format; a format that is not in it has no int8.
        write: writes a network to a path in a format; the text is the licence, and the last argument wraps batches,
            to show progress. What it returns has the scores before and after.
    """

    endings: Mapping[str, str]
    write: Callable[[Network, Path, str, Any, str, Callable[[Iterable[Any], str], Iterable[Any]]], Quantization]


@dataclass(frozen=True)
class Quantization:
    """What a network in int8 is like.

    Args:
        record: for programs, as JSON can hold it.
        lines: for people.
        problem: why the file is not as good as was asked for; None where it is.
    """

    record: dict[str, Any]
    lines: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Export:
    """Networks of a task in files of other runtimes.

    Args:
        write: writes a network to a path in a format, checked on images in RGB; the text is the licence.
        open: from path, card and network of a file to a module and its description.
        compared: what `write` compares, in words; {images} stands for the number of images.
        bound: largest relative L2 difference that `write` allows.
        int8: gives the task's way to int8; None where it has none.
    """

    write: Callable[[Network, Path, Format, Sequence[Image], str], Difference]
    open: Callable[[Path, dict[str, Any], Run], tuple[nn.Module, Any]]
    compared: str
    bound: float
    int8: Callable[[], Int8] | None = None


@dataclass(frozen=True)
class Task:
    """What a network can be for.

    Args:
        name: on the command line, in cards of exported files, and of the folder below `replknet.tasks`.
        noun: what a network of the task is called in texts, with its article.
        field: key of the description in the header of a file of weights.
        keys: regular expression of a key that official weights of the task have, and those of no other task.
        prediction: settings of a prediction, a frozen dataclass whose fields become options of `replknet predict`.
        evaluation: settings of an evaluation, likewise of `replknet eval`.
        options: what the task adds to a recipe.
        recipes: functions that give one each.
        int8: settings of int8, likewise of `replknet export --int8`; None where the task has no int8.
    """

    name: str
    noun: str
    field: str
    keys: str
    prediction: type[Any]
    evaluation: type[Any]
    options: type[Options]
    recipes: tuple[Callable[[], Recipe], ...]
    int8: type[Any] | None = None

    @property
    def files(self) -> Files:
        """Networks in files of weights."""
        found: Files = self._module("files").FILES
        return found

    @property
    def infer(self) -> Infer:
        """Prediction and scores."""
        found: Infer = self._module("infer").INFER
        return found

    @property
    def train(self) -> Train:
        """Training."""
        found: Train = self._module("train").TRAIN
        return found

    @property
    def export(self) -> Export:
        """Networks in files of other runtimes."""
        found: Export = self._module("export").EXPORT
        return found

    def _module(self, name: str) -> Any:
        return import_module(f"replknet.tasks.{self.name}.{name}")

    def has(self, state: Mapping[str, Any]) -> bool:
        """Whether weights under our keys are of this task."""
        return any(re.fullmatch(self.keys, key) for key in state)


def random_images(channels: int, side: int) -> Tensor:
    """Two images of noise `[2,C,H,W]` for a comparison, the same in every call."""
    import torch  # the record itself needs none

    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def named_data(data: Path | None, what: str) -> Path:
    """The folder or archive; a ValueError where none is named."""
    if data is None:
        raise ValueError(f"name the folder or zip of {what} with --data")
    return data


def check_classes(network: tuple[str, ...], data: tuple[str, ...], where: Path) -> None:
    """Raise a ValueError where a data set has other classes than a network."""
    if network != data:
        raise ValueError(
            f"the network has the classes {', '.join(network[:3])}, ..., and {where} has {', '.join(data[:3])}, ...; "
            "they must be the same, in the same order"
        )


def percent(share: float | None) -> str:
    """A share from 0 to 1 for people."""
    return "-" if share is None else f"{100 * share:.1f} %"
