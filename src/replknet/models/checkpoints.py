"""Weights: safe reading, and loading into a model. `replknet.models.key_formats` translates the keys."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from replknet import limits
from replknet.models import pickles
from replknet.models.key_formats import State, to_official
from replknet.models.strangers import hint, looks_like
from replknet.reading import Kind, as_utf8, reading
from replknet.shown import shown

Form = Literal["training", "merged", "folded"]

_log = logging.getLogger(__name__)

# entries of a training checkpoint with its weights, and with their average over the training, in timm's order
_WRAPPERS = ("state_dict", "model", "module")
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
# dtypes of weights
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# letters of a key that an error shows
_LONG = 80
_PREFIXES = ("module.", "_orig_mod.", "model.")


class CheckpointError(ValueError):
    """A file holds no usable weights, or its weights do not fit. The text names file, keys and shapes."""


WEIGHTS = Kind(CheckpointError, "weights", "fetch the file again, or save the weights alone with safetensors")


def read_state_dict(path: str | Path, *, average: bool = True) -> State:
    """Read the tensors of a checkpoint file of any known format, under the official keys. Runs no code in the file.

    Args:
        path: safetensors, a PyTorch file (read with `weights_only`), or a MegEngine pickle. Training checkpoints of
            others may hold options, histories and optimisers beside the weights; they are left out.
        average: whether to prefer the average of the weights over the training, where a file has both, as timm does.
            Without it, the weights of the last step come first. The logger of this module says which were taken.

    Returns:
        Key -> tensor on the CPU, in the dtype of the file. Keys of unknown formats stay unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds no weights, cannot be read without running its code, or asks for
            more than `replknet.limits` allows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with reading(path, WEIGHTS):
        flat, taken = _flat(_content(path), shown(path), average)
        if taken:
            _log.info("%s: took %s", shown(path), taken)
        return to_official(_checked(flat, path))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text fields of a safetensors file; empty for other files."""
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    with reading(path, WEIGHTS), as_utf8(path) as name, safetensors.safe_open(name, framework="pt") as file:
        return dict(file.metadata() or {})


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors do: 8 bytes of header length, then a JSON header."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        header, size = int.from_bytes(head[:8], "little"), path.stat().st_size
        if header > size:
            raise CheckpointError(
                f"{shown(path)} is cut short or damaged: its header declares {header:,} bytes, and the file has "
                f"{size:,}; fetch it again"
            )
        limits.check(header, limits.LIST, "bytes in its header")
        with as_utf8(path) as name, safetensors.safe_open(name, framework="pt") as opened:
            keys = opened.keys()
            limits.check(len(keys), limits.ENTRIES, "tensors")
            return {key: opened.get_tensor(key) for key in keys}
    if head.startswith(pickles.ZIP):
        return pickles.read_archive(path)
    if head.startswith(pickles.PICKLE):
        return pickles.read_bare(path)
    raise CheckpointError(
        f"{shown(path)} is no checkpoint: expected safetensors, a PyTorch file or a MegEngine pickle, "
        f"got a file that begins with {head[:2]!r}"
    )


def unwrapped(content: Any, where: str = "the checkpoint", *, average: bool = True) -> dict[str, Any]:
    """The flat dict of arrays, without the wrappers and key prefixes that training scripts add.

    Args:
        content: what a reader of files returned.
        where: what the error calls it.
        average: see `read_state_dict`.

    Raises:
        CheckpointError: the content has no such dict.
    """
    return _flat(content, where, average)[0]


def _flat(content: Any, where: str, average: bool) -> tuple[dict[str, Any], str]:
    """The flat dict of arrays, and which weights it has if there were several."""
    order = (*_AVERAGES, *_WRAPPERS) if average else (*_WRAPPERS, *_AVERAGES)
    taken = ""
    seen: set[int] = set()
    while isinstance(content, Mapping):
        if id(content) in seen:
            raise CheckpointError(f"{where} holds a dict that contains itself, and no weights")
        seen.add(id(content))
        inner = [key for key in order if isinstance(content.get(key), Mapping) and content[key]]
        if not inner:
            break
        other = next((key for key in inner if (key in _AVERAGES) != (inner[0] in _AVERAGES)), None)
        if other is not None:
            what = "average of the weights" if inner[0] in _AVERAGES else "weights"
            taken = f"the {what}, {inner[0]}; load_checkpoint(..., average={not average}) takes {other}"
        content = content[inner[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no dict of tensors but {type(content).__name__}")
    flat = {str(key): pickles.array_of(value) for key, value in content.items()}
    strangers = [key for key, value in flat.items() if not isinstance(value, Tensor | np.ndarray)]
    if strangers:
        raise CheckpointError(
            f"{where} holds no flat dict of tensors: {listed(strangers, 5)} "
            f"{'is' if len(strangers) == 1 else 'are'} something else; known wrappers are {', '.join(_WRAPPERS)}, and "
            f"{', '.join(_AVERAGES)} for averages"
        )
    # mmengine counts the steps of an average beside it
    if len(flat) > 1 and all(key.startswith("module.") for key in flat if key != "steps"):
        flat.pop("steps", None)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in flat)), None):
        flat = {key.removeprefix(prefix): value for key, value in flat.items()}
    return flat, taken


def _checked(flat: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The tensors, copied and on the CPU. None may claim more memory than its file has."""
    limits.check(len(flat), limits.ENTRIES, "tensors")
    # the smallest files are mostly header
    allowed = limits.SHARING * path.stat().st_size + 2**20
    total = 0
    own: dict[str, Any] = {}
    for key, value in flat.items():
        if not isinstance(value, Tensor):
            own[key] = value
            continue
        name = listed([key])
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"{shown(path)} has {name} as a {value.layout} tensor on {value.device}: expected plain numbers; save "
                "it as a dense tensor"
            )
        size = value.numel() * value.element_size()
        if size > value.untyped_storage().nbytes():
            raise CheckpointError(f"{shown(path)} declares {name} {list(value.shape)}, and has fewer numbers for it")
        total += size
        limits.check(total, allowed, "bytes of tensors that share the bytes of the file")
        # a view would keep the file open, and end the process where someone shortens it
        own[key] = value.clone()
    return own


def checkpoint_filter_fn(state: Mapping[str, Any], model: nn.Module) -> State:
    """timm's hook between a downloaded file and the model."""
    return to_official(unwrapped(state))


def form_of(state: Mapping[str, Tensor]) -> Form:
    """The form of the network with these keys: training, merged (branches), or folded (branches and norms)."""
    if any(".lkb_origin." in key for key in state):
        return "training"
    return "merged" if any(".bn." in key for key in state) else "folded"


@dataclass(frozen=True)
class Mismatch:
    """How a checkpoint differs from a model."""

    missing: list[str]
    unexpected: list[str]
    shapes: dict[str, tuple[list[int], list[int]]]  # key -> shape in the file, shape in the model
    dtypes: dict[str, torch.dtype]  # key -> dtype in the file, where the model cannot take it

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)

    def __str__(self) -> str:
        lines = [
            f"{len(keys)} keys {what}: {listed(keys)}"
            for keys, what in ((self.missing, "missing in the file"), (self.unexpected, "not in the model"))
            if keys
        ]
        lines += [
            f"{listed([key])} is {theirs} in the file and {ours} in the model"
            for key, (theirs, ours) in list(self.shapes.items())[:4]
        ]
        lines += [
            f"{listed([key])} is {dtype} in the file: expected numbers with a fraction of 16 to 64 bits"
            for key, dtype in list(self.dtypes.items())[:2]
        ]
        return "; ".join(lines)


def listed(keys: Iterable[str], most: int = 6) -> str:
    """The first keys of a file, as an error may show them: short and in one line.

    Args:
        keys: keys of a state dict.
        most: number of keys to show.
    """
    first = [shown(key[:_LONG]) for _, key in zip(range(most + 1), keys, strict=False)]
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")


def mismatch(state: Mapping[str, Tensor], model: nn.Module) -> Mismatch:
    """The keys, shapes and dtypes of a state dict that do not fit a model."""
    own = model.state_dict()
    both = [key for key in own if key in state]
    return Mismatch(
        missing=[key for key in own if key not in state],
        unexpected=[key for key in state if key not in own],
        shapes={
            key: (list(state[key].shape), list(own[key].shape)) for key in both if state[key].shape != own[key].shape
        },
        dtypes={
            key: state[key].dtype for key in both if own[key].is_floating_point() and state[key].dtype not in _FLOATS
        },
    )


def load_checkpoint(model: nn.Module, path: str | Path, *, classifier: bool = True, average: bool = True) -> None:
    """Load weights of any known key format into a model. Strict: all keys fit, or the model stays unchanged.

    Args:
        model: a RepLKNet, or a UperNet over one, in the form of the checkpoint (training, merged or folded). Its
            parameters keep their dtype and device.
        path: see `read_state_dict`.
        classifier: whether to load the classifier; if not, the model keeps its own, for other classes.
        average: whether to prefer the average of the weights; see `read_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no weights, or weights of another network or form. The text names the file,
            the keys and both shapes; for a known network of others, it names that network.
    """
    state = read_state_dict(path, average=average)
    if not classifier:
        own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
        state = {key: value for key, value in state.items() if not key.startswith("head.")} | own
    wrong = mismatch(state, model)
    if wrong:
        raise CheckpointError(
            f"{shown(path)} does not fit {type(model).__name__}: {wrong}{_way_out(state, wrong, model)}"
        )
    model.load_state_dict(state)


def _way_out(state: State, wrong: Mismatch, model: nn.Module) -> str:
    if looks_like(state) is not None:
        return hint(state)
    theirs, ours = form_of(state), form_of(model.state_dict())
    if theirs != ours:
        into = {
            "training": "build the model without merging it",
            "merged": "load into replknet.merge(model, fold_bn=False)",
            "folded": "load into replknet.merge(model)",
        }
        return f". The file is in the {theirs} form and the model in the {ours} form: {into[theirs]}"
    if set(wrong.shapes) | set(wrong.missing) | set(wrong.unexpected) <= {"head.weight", "head.bias"}:
        classes = len(state["head.bias"]) if "head.bias" in state else 0
        return f". The classifiers differ: build the model with num_classes={classes}"
    return ""
