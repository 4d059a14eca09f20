"""The record of a task. Training, commands and exports use it, so that none of them knows a task by name.

A task is a folder with the modules `files`, `infer`, `train`, `export`, `recipes` and `settings`. Each of the first
four defines one record of a class below, and is imported on first use: predictions need no Lightning. `--help` reads
the last two, which need no torch.
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


# wraps batches to show progress
Shown = Callable[[Iterable[Any]], Iterable[Any]]


class Description(Protocol):
    """Which network a file of weights belongs to, and which images the network expects."""

    @property
    def name(self) -> str:
        """timm's name of the network, or of its backbone."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    def build(self) -> nn.Module:
        """A new network with this description, untrained."""
        ...


@dataclass(frozen=True)
class Network:
    """A network, its task and its description.

    Args:
        task: what the network does.
        model: the network, in eval mode, on the CPU. For an exported file, a module that runs it in its own runtime.
        description: the task's own record of classes, preparation of images and architecture.
    """

    task: Task
    model: nn.Module
    description: Any


@dataclass(frozen=True)
class Prediction:
    """What a network finds in an image.

    Args:
        record: the result for programs, ready for JSON.
        text: the result for people, one line.
        draw: makes a matplotlib figure; None if there is nothing to draw.
    """

    record: dict[str, Any]
    text: str
    draw: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of a network on a data set.

    Args:
        record: the scores for programs, ready for JSON.
        lines: the scores for people.
    """

    record: dict[str, Any]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The inputs and outputs by which two forms of a network are compared.

    Args:
        random: images of noise `[N,C,H,W]`.
        image: maps an image in RGB to the network's input, a batch of one.
        output: maps a network and a batch to the tensor that is compared.
    """

    random: Tensor
    image: Callable[[Image], Tensor]
    output: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Files:
    """How a task reads and writes files of weights.

    Args:
        load: maps a file that was read, and a dtype (None: the file's), to the network in the file's form and its
            description.
        save: writes a network and its description to a path: completely or not at all.
    """

    load: Callable[[Source, torch.dtype | None], tuple[Any, Any]]
    save: Callable[[Any, str | Path, Any], None]


@dataclass(frozen=True)
class Infer:
    """Prediction and scores of a task. They need no Lightning.

    Args:
        predictor: maps a network and settings to a function from an image in RGB to its prediction.
        evaluate: scores a network on the data in a folder or archive; None: the task's default data, if there is any.
        comparison: maps a network to the inputs and outputs by which its forms are compared.
    """

    predictor: Callable[[Network, Any], Callable[[Image], Prediction]]
    evaluate: Callable[[Network, Path | None, Any, Shown], Scored]
    comparison: Callable[[Network], Comparison]


@dataclass(frozen=True)
class Int8:
    """How a task writes networks in int8.

    Args:
        endings: format -> ending of its int8 files; other formats have no int8.
        write: writes a network; the arguments are network, path, format, settings, licence, and a function that wraps
            named batches to show progress. The result has the scores before and after.
    """

    endings: Mapping[str, str]
    write: Callable[[Network, Path, str, Any, str, Callable[[Iterable[Any], str], Iterable[Any]]], Quantization]


@dataclass(frozen=True)
class Quantization:
    """The scores, sizes and times of a network in int8.

    Args:
        record: the figures for programs, ready for JSON.
        lines: the figures for people.
        problem: why the file misses the wanted accuracy; None if it does not.
    """

    record: dict[str, Any]
    lines: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class Export:
    """How a task writes and reads files for other runtimes.

    Args:
        write: writes a network and checks the file; the arguments are network, path, format, images in RGB to check on,
            and licence.
        open: maps path, card and runner of a file to a module and its description.
        compared: what `write` compares, in words; {images} stands for the number of images.
        bound: largest relative L2 difference that `write` allows.
        int8: returns how the task writes int8; None if it does not.
    """

    write: Callable[[Network, Path, Format, Sequence[Image], str], Difference]
    open: Callable[[Path, dict[str, Any], Run], tuple[nn.Module, Any]]
    compared: str
    bound: float
    int8: Callable[[], Int8] | None = None


@dataclass(frozen=True)
class Task:
    """One purpose of networks, and the code for it.

    Args:
        name: name on the command line, in cards of exported files, and of the folder below `replknet.tasks`.
        noun: name of such a network in texts, with its article.
        field: key of the description in the header of a file of weights.
        keys: regular expression. Official weights of this task have a key that matches; weights of other tasks do not.
        prediction: class of the settings for a prediction. Its fields become options of `replknet predict`.
        evaluation: class of the settings for an evaluation. Its fields become options of `replknet eval`.
        options: class of the fields that the task adds to a recipe.
        recipes: functions that return one recipe each.
        int8: class of the settings for int8. Its fields become options of `replknet export --int8`. None: no int8.
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
        """Reads and writes files of weights."""
        found: Files = self._module("files").FILES
        return found

    @property
    def infer(self) -> Infer:
        """Predicts and scores."""
        found: Infer = self._module("infer").INFER
        return found

    @property
    def train(self) -> Train:
        """Trains."""
        found: Train = self._module("train").TRAIN
        return found

    @property
    def export(self) -> Export:
        """Reads and writes files for other runtimes."""
        found: Export = self._module("export").EXPORT
        return found

    def _module(self, name: str) -> Any:
        return import_module(f"replknet.tasks.{self.name}.{name}")

    def has(self, state: Mapping[str, Any]) -> bool:
        """Whether weights belong to this task; the keys are ours."""
        return any(re.fullmatch(self.keys, key) for key in state)


def random_images(channels: int, side: int) -> Tensor:
    """Two images of noise `[2,C,H,W]` for a comparison, equal in every call."""
    import torch  # `--help` imports this module, and should not wait for torch

    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def named_data(data: Path | None, what: str) -> Path:
    """The folder or archive; a ValueError if it is None."""
    if data is None:
        raise ValueError(f"name the folder or zip of {what} with --data")
    return data


def check_classes(network: tuple[str, ...], data: tuple[str, ...], where: Path) -> None:
    """Raise a ValueError if a data set has other classes than a network."""
    if network != data:
        raise ValueError(
            f"the network has the classes {', '.join(network[:3])}, ..., and {where} has {', '.join(data[:3])}, ...; "
            "they must be the same, in the same order"
        )


def percent(share: float | None) -> str:
    """A share from 0 to 1 as a text in percent; "-" for None."""
    return "-" if share is None else f"{100 * share:.1f} %"
