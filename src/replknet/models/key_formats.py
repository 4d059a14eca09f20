"""Pure functions from every published key format to the official one.

Key formats:
- official: DingXiaoH/RepLKNet-pytorch; our own parameters have these names;
- mmpretrain: prefix `backbone.`, the final norm as `stages.3.norm`, the classifier as `head.fc`;
- mmsegmentation 0.x: prefix `backbone.`, and heads with `bn` and `conv_seg`;
- mmdetection 2.x: see `replknet.models.detection_keys`;
- MegEngine: flat `blocks`, batch-norm arrays of [1,C,1,1], grouped kernels of [C,1,1,K,K], images in BGR.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replknet.models.detection_keys import from_mmdet, is_mmdet

State = dict[str, Tensor]


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
