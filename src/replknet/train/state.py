"""The state in a `last.ckpt`: looked at before a training goes on from it."""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from replknet import limits
from replknet.reading import Kind, reading
from replknet.shown import shown
from replknet.train.files import is_number, told, wrong_rows


class StateError(RuntimeError):
    """A state that cannot be written or read; the text says which, why, and what is left."""


_WAY_OUT = "go on from a copy of the file, or start anew with another --output"
KIND = Kind(StateError, "the state of a training", _WAY_OUT)
# what Lightning wrote, and its type
_PARTS: dict[str, type[Any]] = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
# settings of a group that an optimiser computes with
_RATES = {"lr", "initial_lr", "lr_scale", "weight_decay"}
# largest number of a counter: torch counts in int64
_MOST = 2**63 - 1


@dataclass(frozen=True)
class State:
    """What a training goes on from.

    Args:
        path: the file.
        content: what is in it, with weights that have shapes alone, and without the state of the optimiser.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Number of steps that are done."""
        steps: int = self.content["global_step"]
        return steps

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The fields of the recipe; the earliest states have none."""
        recipe: Mapping[str, Any] = self.content.get("replknet_recipe", {})
        return recipe


def read_state(path: Path) -> State:
    """The state in a file, after a look at its checksums and at what it has.

    Raises:
        StateError: it is cut short, damaged, or no state of a training.
    """
    check_whole(path)
    with reading(path, KIND):
        # with mmap, torch would not compare the sizes of tensors with those in the file
        content = torch.load(path, map_location="cpu", weights_only=True)
    wrong = _wrong(content)
    if wrong is not None:
        raise StateError(f"{shown(path)} is no state of a training: {wrong}; {_WAY_OUT}")
    # Lightning reads the file again: until then its tensors take no memory
    weights = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in content["state_dict"].items()}
    return State(path, {**content, "state_dict": weights, "optimizer_states": []})


def check_whole(path: Path) -> None:
    """Compare a state with the checksums in it.

    Args:
        path: of a `last.ckpt`.

    Raises:
        StateError: it is cut short or damaged.
    """
    with reading(path, KIND), zipfile.ZipFile(path) as file:
        members = file.infolist()
        limits.check(len(members), limits.ENTRIES, "parts")
        # torch stores; an archive that inflates could do so without an end
        packed = next((one.filename for one in members if one.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise ValueError(f"{packed} is compressed, and torch compresses nothing")
        damaged = file.testzip()
    if damaged is not None:
        raise StateError(f"{shown(path)} is damaged: the checksum of {shown(damaged)} does not fit; {_WAY_OUT}")


def check_fits(state: State, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Compare a state with the training that is to go on from it.

    Args:
        state: the state.
        trainer: has not started.
        module: has the network, not divided among processes.

    Raises:
        StateError: the state has other weights, or other counters.
    """
    wrong = _wrong_weights(state.content["state_dict"], module.state_dict())
    if wrong is None:
        same = state.content["pytorch-lightning_version"] == version("pytorch-lightning")
        found = state.content["loops"].get("fit_loop")
        wrong = _other_form(found, trainer.fit_loop.state_dict(), "fit_loop", same)
    if wrong is not None:
        raise StateError(f"{shown(state.path)} does not fit this training: {wrong}; {_WAY_OUT}")


def _wrong(content: object) -> str | None:
    """What is wrong with a state, whatever the training; None if nothing is."""
    if not isinstance(content, dict):
        return f"expected a dict, got {told(content)}"
    for name, kind in _PARTS.items():
        value = content.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} must be of type {kind.__name__}, got {told(value)}"
        if isinstance(value, int) and not 0 <= value <= _MOST:
            return f"{name} must be a number of steps or epochs, got {told(value)}"
    if not _is_plain(content.get("replknet_recipe", {})) or not isinstance(content.get("replknet_recipe", {}), dict):
        return "replknet_recipe must have the fields of a recipe"
    written = content.get("pytorch-lightning_version")
    if not isinstance(written, str) or re.fullmatch(r"\d+(\.\d+)+[\w.+]*", written) is None:
        return f"pytorch-lightning_version must be a version such as 2.6.6, got {told(written)}"
    return _wrong_curve(content["callbacks"]) or _wrong_optimisers(content)


def _wrong_curve(callbacks: Mapping[Any, Any]) -> str | None:
    """What is wrong with the curve, which `KeepCurve` reads."""
    kept = callbacks.get("KeepLast")
    if not isinstance(kept, dict):
        return f"the curve must be a dict, got {told(kept)}"
    wrong = wrong_rows(kept.get("curve"))
    if wrong is not None:
        return f"the curve is damaged: {wrong}"
    seconds, losses = kept.get("seconds", 0.0), kept.get("losses", [])
    if not is_number(seconds):
        return f"the seconds of the epoch must be a number, got {told(seconds)}"
    if not isinstance(losses, list) or not all(map(is_number, losses)):
        return f"the losses of the epoch must be a list of numbers, got {told(losses)}"
    return None


def _wrong_optimisers(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the states of optimisers and schedules."""
    for name in ("optimizer_states", "lr_schedulers"):
        if len(content[name]) != 1 or not isinstance(content[name][0], dict):
            return f"{name} must have one state, got {told(content[name])}"
        if not all(isinstance(key, str) for key in content[name][0]):
            return f"{name} must have texts as keys"
    (optimiser,) = content["optimizer_states"]
    groups, states = optimiser.get("param_groups"), optimiser.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return f"param_groups must be a list of dicts, got {told(groups)}"
    places: list[Any] = []
    for group in groups:
        if not isinstance(group.get("params"), list):
            return f"the params of a group must be a list, got {told(group.get('params'))}"
        places += group["params"]
    if not all(type(place) is int for place in places) or len(set(places)) < len(places):
        return "the params of the groups must be numbers, each once"
    if not isinstance(states, dict) or not set(states) <= set(places):
        return f"the optimiser's state must be of the params of its groups, got {told(states)}"
    for group in groups:
        wrong = _wrong_group(group, [states[place] for place in group["params"] if place in states])
        if wrong is not None:
            return wrong
    return None if _is_plain(content["lr_schedulers"]) else "lr_schedulers must have numbers and texts alone"


def _wrong_group(group: Mapping[Any, Any], states: list[Any]) -> str | None:
    """What is wrong with a group of an optimiser's params, and with what it keeps of each param."""
    # optimisers have settings of many types; LAMB keeps a bound as a tensor of one number
    if any(isinstance(value, Tensor) and value.numel() != 1 for value in group.values()):
        return "the settings of a group must be single values"
    for name in _RATES.intersection(group):
        if not is_number(group[name]):
            return f"{name} of a group must be a number, got {told(group[name])}"
    # a field has one type in a group; a param of another shape may lack it, but all count their steps
    types: dict[str, type[Any]] = {}
    for one in states:
        if not isinstance(one, dict) or not all(isinstance(key, str) for key in one):
            return f"the optimiser's state of a param must be a dict, got {told(one)}"
        for name, value in one.items():
            if not isinstance(value, types.setdefault(name, type(value))):
                return f"{told(name)} of a param must be of type {types[name].__name__}, got {told(value)}"
        if ("step" in one) != ("step" in states[0]):
            return "the optimiser's state of a param lacks its number of steps"
    return None


def _wrong_weights(found: Mapping[Any, Any], wanted: Mapping[str, Tensor]) -> str | None:
    """How weights differ from those of the network in their names, shapes and kinds; None if they do not."""
    if found.keys() != wanted.keys():
        (other, *_) = sorted(map(str, found.keys() ^ wanted.keys()))
        return f"{told(other)} is in only one of state and network"
    for name, tensor in wanted.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else told(value)
            return f"{name} must be a tensor {list(tensor.shape)}, got {shape}"
        if value.is_floating_point() != tensor.is_floating_point() or value.layout != tensor.layout:
            return f"{name} must be of {tensor.dtype}, got {value.dtype}"
    return None


def _other_form(found: object, wanted: object, where: str, complete: bool) -> str | None:
    """How counters differ from those of a new training in their form; None if they do not.

    With `complete`, all must be there; an earlier version of Lightning may lack some.
    """
    if not isinstance(wanted, dict):
        same = type(found) is type(wanted) or (is_number(found) and is_number(wanted))
        fits = same and (not isinstance(found, int) or 0 <= found <= _MOST)
        return None if fits else f"{where} must be like {told(wanted)}, got {told(found)}"
    if not isinstance(found, dict):
        return f"{where} must be a dict, got {told(found)}"
    for name, value in wanted.items():
        if name not in found:
            if complete:
                return f"{where} lacks {name}"
            continue
        wrong = _other_form(found[name], value, f"{where}.{name}", complete)
        if wrong is not None:
            return wrong
    return None


def _is_plain(value: object) -> bool:
    """Whether a value has nothing but what JSON has."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
