"""Weights: safe reading, and pure functions from every published key format to the official one.

Key formats:
- official: DingXiaoH/RepLKNet-pytorch; our own parameters have these names;
- mmpretrain: prefix `backbone.`, the final norm as `stages.3.norm`, the classifier as `head.fc`;
- mmsegmentation 0.x: prefix `backbone.`, and heads with `bn` and `conv_seg`;
- mmdetection 2.x: see `replknet.models.detection_keys`;
- MegEngine: flat `blocks`, batch-norm arrays of [1,C,1,1], grouped kernels of [C,1,1,K,K], images in BGR.
"""

import codecs
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from replknet.models.detection_keys import from_mmdet, is_mmdet

State = dict[str, Tensor]
Form = Literal["training", "merged", "folded"]

_WRAPPERS = ("state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


class CheckpointError(ValueError):
    """A file holds no usable weights, or its weights do not fit. The text names file, keys and shapes."""


def read_state_dict(path: str | Path) -> State:
    """Read the tensors of a checkpoint file of any known format, under the official keys. Runs no code in the file.

    Args:
        path: safetensors, a PyTorch file (read with `weights_only`), or a MegEngine pickle.

    Returns:
        Key -> tensor on the CPU, in the dtype of the file. Keys of unknown formats stay unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is cut short, holds no weights, or cannot be read without running its code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return to_official(unwrapped(_content(path), str(path)))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text fields of a safetensors file; empty for other files."""
    if not _is_safetensors(Path(path)):
        return {}
    with safetensors.safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors do: 8 bytes of header length, then a JSON header."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(2)
    if _is_safetensors(path):
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is a damaged safetensors file ({error}); fetch it again") from error
    try:
        if head == b"PK":
            return torch.load(path, map_location="cpu", weights_only=True)
        if head[:1] == b"\x80":
            return _pickled(path)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights ({str(error).splitlines()[0]}); it is cut short, or holds "
            "objects other than tensors"
        ) from error
    raise CheckpointError(
        f"{path} is no checkpoint: expected safetensors, a PyTorch file or a MegEngine pickle, "
        f"got a file that begins with {head!r}"
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and OrderedDicts. Refuses any other object in a pickle before it is built."""

    _allowed: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy's constructor of an empty array; its module moved in numpy 2
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.zeros(0))[0],
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.zeros(0))[0],
        # pickle protocol 2 writes the bytes of an array as a call of this function
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused {module}.{name}: only numpy arrays are read") from None


def _pickled(path: Path) -> Any:
    """A bare pickle: a file of PyTorch before 1.6, which begins with a number, or a MegEngine file."""
    with path.open("rb") as file:
        first = _ArraysOnly(file).load()
    if isinstance(first, int):
        return torch.load(path, map_location="cpu", weights_only=True)
    return first


def unwrapped(content: Any, where: str = "the checkpoint") -> dict[str, Any]:
    """The flat dict of arrays, without the wrappers and key prefixes that training scripts add.

    Raises:
        CheckpointError: the content has no such dict.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{where} holds no dict of tensors but {type(content).__name__}")
    strangers = [str(key) for key, value in content.items() if not isinstance(value, Tensor | np.ndarray)]
    if strangers:
        raise CheckpointError(
            f"{where} holds no flat dict of tensors: {', '.join(strangers[:5])} "
            f"{'is' if len(strangers) == 1 else 'are'} something else; known wrappers are {', '.join(_WRAPPERS)}"
        )
    flat = dict(content)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in flat)), None):
        flat = {key.removeprefix(prefix): value for key, value in flat.items()}
    return flat


def to_official(state: Mapping[str, Any]) -> State:
    """Official keys and torch tensors from any known key format; unknown keys stay unchanged."""
    if any(".pre_bn." in key for key in state):
        return from_megengine(state)
    tensors = {key: torch.as_tensor(value) for key, value in state.items()}
    if is_mmdet(tensors):
        return from_mmdet(tensors)
    if any(_SEGMENTATION_HEAD.match(key) for key in tensors):
        return from_mmseg(tensors)
    if "head.fc.weight" in tensors:
        return from_mmpretrain(tensors)
    if tensors and all(key.startswith("backbone.") for key in tensors):
        return {key.removeprefix("backbone."): value for key, value in tensors.items()}
    return {_classifier(key): value for key, value in tensors.items()}


def _classifier(key: str) -> str:
    """Some pre-training checkpoints keep the 22K classifier as `head.cls_22k`."""
    return re.sub(r"^head\.cls_22k\.", "head.", key)


def from_mmpretrain(state: Mapping[str, Tensor]) -> State:
    """Translate mmpretrain's keys to the official ones. In mmpretrain `stages.3.norm` is the *final* norm."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^head\.fc\.", "head.", key.removeprefix("backbone."))
        renamed[re.sub(r"^stages\.3\.norm\.", "norm.", key)] = value
    return renamed


_MEGENGINE = (  # prefixes in a block: (MegEngine's, official block: 0 = large kernel, 1 = feed-forward, official)
    ("pre_bn.", 0, "prelkb_bn."),
    ("pw1.", 0, "pw1."),
    ("dw.dw_large.", 0, "large_kernel.lkb_origin."),
    ("dw.dw_small_", 0, "large_kernel.small_conv."),
    ("pw2.", 0, "pw2."),
    ("premlp_bn.", 1, "preffn_bn."),
    ("mlp.fc1.", 1, "pw1."),
    ("mlp.fc2.", 1, "pw2."),
)


def from_megengine(state: Mapping[str, Any]) -> State:
    """Translate MegEngine's keys and array shapes to the official ones, and the stem's channels from BGR to RGB."""
    # a flat block with numbered children is a transition, which ends a stage
    ends = sorted({int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.\d\.", key))})
    translated: State = {}
    for key, value in state.items():
        official = _official_from_megengine(key, ends)
        array = torch.as_tensor(np.asarray(value))
        if official.endswith(".conv.weight") and array.dim() == 5:
            array = array[:, 0]
        elif ".bn." in official or "_bn." in official or official.startswith("norm."):
            array = array.reshape(-1)
        if official == "stem.0.conv.weight":
            array = array.flip(1)
        translated[official] = array
        if official.endswith("running_mean"):
            translated[official.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return translated


def _official_from_megengine(key: str, ends: list[int]) -> str:
    if match := re.match(r"stem\.(\d+)\.(.+)", key):
        return f"stem.{int(match[1]) // 2}.{match[2]}"
    match = re.match(r"blocks\.(\d+)\.(.+)", key)
    if match is None:
        return key
    index, rest = int(match[1]), match[2]
    stage = sum(end < index for end in ends)
    if index in ends:
        child, name = rest.split(".", 1)
        return f"transitions.{stage}.{int(child) // 2}.{name}"
    pair = index - (ends[stage - 1] + 1 if stage else 0)
    for theirs, second, ours in _MEGENGINE:
        if rest.startswith(theirs):
            # dw_small_5.conv.weight carries the kernel's side in its name
            tail = re.sub(r"^\d+\.", "", rest.removeprefix(theirs))
            return f"stages.{stage}.blocks.{2 * pair + second}.{ours}{tail}"
    return key


def from_mmseg(state: Mapping[str, Tensor]) -> State:
    """Translate keys of mmsegmentation 0.x (backbone, UPerHead, FCNHead) to keys of our UperNet.

    Args:
        state: key -> tensor.

    Returns:
        The same tensors under our keys; other keys stay unchanged.
    """
    return {_mmseg_to_ours(key): value for key, value in state.items()}


def to_mmseg(state: Mapping[str, Tensor]) -> State:
    """Translate keys of `replknet.tasks.segmentation.heads.UperNet` to keys of mmsegmentation 0.x.

    Args:
        state: key -> tensor.

    Returns:
        The same tensors under mmsegmentation's keys; other keys stay unchanged.
    """
    renamed = {}
    for key, value in state.items():
        key = key.replace("backbone.model.", "backbone.", 1)
        if _SEGMENTATION_HEAD.match(key):
            key = key.replace(".batch_norm.", ".bn.").replace("_head.classifier.", "_head.conv_seg.")
        renamed[key] = value
    return renamed


_SEGMENTATION_HEAD = re.compile(r"(decode|auxiliary)_head\.")


def _mmseg_to_ours(key: str) -> str:
    if _SEGMENTATION_HEAD.match(key):
        return key.replace(".bn.", ".batch_norm.").replace("_head.conv_seg.", "_head.classifier.")
    if key.startswith("backbone.") and not key.startswith("backbone.model."):
        return key.replace("backbone.", "backbone.model.", 1)
    return key


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

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        lines = [
            f"{len(keys)} keys {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
            for keys, what in ((self.missing, "missing in the file"), (self.unexpected, "not in the model"))
            if keys
        ]
        lines += [
            f"{key} is {theirs} in the file and {ours} in the model"
            for key, (theirs, ours) in list(self.shapes.items())[:6]
        ]
        return "; ".join(lines)


def mismatch(state: Mapping[str, Tensor], model: nn.Module) -> Mismatch:
    """The keys and shapes of a state dict that do not fit a model."""
    own = model.state_dict()
    return Mismatch(
        missing=[key for key in own if key not in state],
        unexpected=[key for key in state if key not in own],
        shapes={
            key: (list(state[key].shape), list(own[key].shape))
            for key in own
            if key in state and state[key].shape != own[key].shape
        },
    )


def load_checkpoint(model: nn.Module, path: str | Path, *, classifier: bool = True) -> None:
    """Load weights of any known key format into a model. Strict: all keys fit, or the model stays unchanged.

    Args:
        model: a RepLKNet, or a UperNet over one, in the form of the checkpoint (training, merged or folded). Its
            parameters keep their dtype and device.
        path: see `read_state_dict`.
        classifier: whether to load the classifier; if not, the model keeps its own, for other classes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no weights, or weights of another network or form. The text names the file,
            the keys and both shapes.
    """
    state = read_state_dict(path)
    if not classifier:
        own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
        state = {key: value for key, value in state.items() if not key.startswith("head.")} | own
    wrong = mismatch(state, model)
    if wrong:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {wrong}{_way_out(state, wrong, model)}")
    model.load_state_dict(state)


def _way_out(state: State, wrong: Mismatch, model: nn.Module) -> str:
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
