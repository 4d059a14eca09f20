"""Files of networks of any task: the task of a file, and the network in it."""

from pathlib import Path

import torch
from torch import nn

from replknet.deploy.files import card_in, is_exported
from replknet.models import CheckpointError
from replknet.models.checkpoints import listed
from replknet.models.model_files import FIELD, Source, read
from replknet.models.strangers import hint
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.task import Network, Task


def load(path: str | Path, trust: bool = False) -> nn.Module:
    """The network in a file of any task, in eval mode on the CPU.

    Args:
        path: weights that this package wrote, published weights of any known key format, the name of weights that
            come with the package, or a file that `replknet export` wrote. An exported file runs in its own runtime.
        trust: whether to run the code in a `.pt2` or `.aoti.pt2` file, which is a program and not data.

    Returns:
        The network, in the form and the dtype of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ExportedError: an exported file is damaged, has no card of replknet's, or is a program that is not trusted.
        CheckpointError: the file holds no network of replknet's.
    """
    return load_network(path, dtype=None, trust=trust).model


def load_weights(path: str | Path, task: str | None = None) -> Network:
    """The network in a file of weights, in float32, for those who change or look into its layers; see `load_network`.

    Raises:
        ValueError: the file was exported for another runtime, or as `load_network` says.
    """
    if is_exported(path):
        raise ValueError(f"{path} is a file for another runtime, which has no layers: give the weights it was made of")
    return load_network(path, task)


def load_network(
    path: str | Path, task: str | None = None, dtype: torch.dtype | None = torch.float32, trust: bool = False
) -> Network:
    """The network in a file, with its task and its description.

    Args:
        path: see `load`.
        task: name of the task that the caller expects; None: any.
        dtype: dtype of the network; None: the file's. An exported file always keeps its own.
        trust: see `load`.

    Returns:
        The network, its task and its description.

    Raises:
        FileNotFoundError: there is no such file.
        ExportedError: an exported file is damaged, has no card of replknet's, or is a program that is not trusted.
        CheckpointError: the file holds no network of replknet's, or a network of another task.
    """
    if is_exported(path):
        card, run = card_in(Path(path), trust)
        found = _named(card.pop("task", _FIRST), path)
        _check(found, task, path)
        model, description = found.export.open(Path(path), card, run)
        return Network(found, model.eval(), description)
    source = read(path)
    found = task_of(source)
    _check(found, task, path)
    model, description = found.files.load(source, dtype)
    return Network(found, model, description)


def task_of(source: Source) -> Task:
    """The task of a file of weights, from the description in its header or, without one, from its keys.

    Raises:
        CheckpointError: the keys belong to no task, or to several.
    """
    described = [field for field in source.texts if field == FIELD or field.startswith(f"{FIELD}_")]
    found = [task for task in TASKS.values() if task.field in described]
    if described and not found:
        raise CheckpointError(
            f"{source.path} has a description that this version does not know ({', '.join(described)}): it was "
            "written by a later version of replknet"
        )
    found = found or [task for task in TASKS.values() if task.has(source.state)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{source.path} could be {' or '.join(task.noun for task in found)}, and does not say which: build the "
            "network, load the file with replknet.load_checkpoint, and save it with its description"
        )
    expected = ", ".join(f"{task.keys} ({task.noun})" for task in TASKS.values())
    raise CheckpointError(
        f"{source.path} holds no network of a known task: expected a key like {expected}; got "
        f"{listed(source.state, 4)}{hint(source.state)}"
    )


# task of an exported file whose card names none: old cards have no task
_FIRST = "classification"


def _named(name: str, path: str | Path) -> Task:
    if name not in TASKS:
        raise CheckpointError(
            f"{path} is for {shown(name)}, which this version does not know: expected {', '.join(TASKS)}"
        )
    return TASKS[name]


def _check(found: Task, wanted: str | None, path: str | Path) -> None:
    if wanted is not None and found.name != wanted:
        raise CheckpointError(f"{path} holds {found.noun}, not {TASKS[wanted].noun}: leave out --task {wanted}")
