"""Parameter names in mmdetection 2.x and in our own detectors, FCOS and Cascade R-CNN.

Our heads keep the official names. Our backbone, pyramid and region proposals have names from timm and torchvision.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# (ours, mmdetection's); # stands for a number, which both share
_PAIRS = (
    ("pyramid.backbone.model.", "backbone."),
    ("pyramid.neck.inner_blocks.#.0.", "neck.lateral_convs.#.conv."),
    ("pyramid.neck.layer_blocks.#.0.", "neck.fpn_convs.#.conv."),
    # FCOS: two more levels after the first three
    ("pyramid.neck.extra_blocks.p6.", "neck.fpn_convs.3.conv."),
    ("pyramid.neck.extra_blocks.p7.", "neck.fpn_convs.4.conv."),
    ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
    ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
    ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
    ("bbox_head.#.", "roi_head.bbox_head.#."),
    ("mask_head.#.", "roi_head.mask_head.#."),
)


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of an mmdetection detector."""
    return any(key.startswith("neck.lateral_convs.") for key in state)


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate keys of mmdetection 2.x to keys of our detectors.

    mmdetection's FCOS becomes `replknet.tasks.detection.fcos.FCOS`, and its CascadeRCNN becomes
    `replknet.tasks.detection.cascade.CascadeRCNN`.

    Args:
        state: key -> tensor.

    Returns:
        The same tensors under our keys; other keys stay unchanged.
    """
    fcos = any(key.startswith("bbox_head.conv_cls.") for key in state)
    pairs = [(theirs, ours) for ours, theirs in _PAIRS]
    if fcos:
        # match the last two fpn_convs, the extra levels, before the numbered pattern
        pairs.sort(key=lambda pair: "#" in pair[0])
    else:
        pairs = [pair for pair in pairs if "extra_blocks" not in pair[1]]
    return {_renamed(key, pairs): value for key, value in state.items()}


def to_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate keys of our FCOS and CascadeRCNN to keys of mmdetection 2.x.

    Args:
        state: key -> tensor.

    Returns:
        The same tensors under mmdetection's keys; other keys stay unchanged.
    """
    return {_renamed(key, _PAIRS): value for key, value in state.items()}


def _renamed(key: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    for old, new in pairs:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
        if match:
            return new.replace("#", match[1] if match.groups() else "") + key[match.end() :]
    return key
