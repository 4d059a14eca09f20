"""Files of segmentation networks. Ours have a description; the official ones are recognised by their keys."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from replknet.data.mask_transforms import Normalize
from replknet.data.masks import Classes, shipped_classes
from replknet.models import CheckpointError
from replknet.models.checkpoints import listed
from replknet.models.model_files import (
    NETWORK,
    Source,
    filled,
    parsed,
    read,
    write,
)
from replknet.models.sizes import check_classes, check_pixels
from replknet.models.strangers import hint
from replknet.reading import reading
from replknet.shown import shown
from replknet.tasks.backbone import check_backbone, check_sizes, official_backbone
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary
from replknet.tasks.task import Files

# key of the description in the header of a file
FIELD = "replknet_segmentation"


@dataclass(frozen=True, kw_only=True)
class SegmentationDescription:
    """Which network a file of weights belongs to, and which images the network expects.

    Args:
        backbone: timm's name of the backbone.
        network: options of the backbone, such as kernels, as timm.create_model takes them.
        classes: names of the classes.
        palette: colours of the classes, RGB.
        channels: channels of UperNet's head.
        auxiliary_channels: channels of the auxiliary head; None: no such head.
        align_corners: whether every interpolation aligns corners.
        scale: longer and shorter side that an image is fitted into, pixels; None: the image's own size.
        window: side of the sliding windows, pixels; None: the whole image at once.
        stride: distance from one window to the next, pixels.
        mean: mean of each channel in RGB, for values from 0 to 1.
        std: standard deviation of each channel in RGB, for values from 0 to 1.

    Raises:
        ValueError: a size is not positive, or beyond what `replknet.limits` allows; or the backbone is no network of
            timm's, or has options that fetch other files.
    """

    backbone: str
    network: dict[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    channels: int
    auxiliary_channels: int | None
    align_corners: bool
    scale: tuple[int, int] | None
    window: int | None
    stride: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        check_backbone(self.backbone, self.network)
        check_pixels(self.mean, self.std)
        check_classes(self.classes)
        # it checks the numbers of both, too
        Classes(self.classes, self.palette)
        if any(not 0 <= value <= 255 for colour in self.palette for value in colour):
            raise ValueError("a colour has values from 0 to 255")
        check_sizes(self.channels, self.auxiliary_channels, *(self.scale or ()), self.window, self.stride)

    @property
    def colours(self) -> Classes:
        return Classes(self.classes, self.palette)

    def build(self, **options: Any) -> UperNet:
        """The network, untrained; `options` are further options of the backbone."""
        backbone = timm.create_model(self.backbone, features_only=True, **self.network, **options)
        return UperNet(backbone, len(self.classes), self.channels, self.auxiliary_channels, self.align_corners)

    @property
    def name(self) -> str:
        """timm's name of the backbone."""
        return self.backbone

    @property
    def normalize(self) -> Normalize:
        """The last step of an image before the network."""
        return Normalize(self.mean, self.std)


def save_segmentation(model: nn.Module, path: str | Path, description: SegmentationDescription) -> None:
    """Write a network to a safetensors file. An existing file is replaced only after the new one is complete.

    Args:
        model: a UperNet in any form: training, merged or folded, with or without its auxiliary head.
        path: the file; a missing folder is created.
        description: how to build the network again and how to feed it; it goes into the file's header.
    """
    write(model, path, {FIELD: json.dumps(asdict(description))})


def load_segmentation(path: str | Path, dtype: torch.dtype | None = None) -> tuple[UperNet, SegmentationDescription]:
    """The network of a checkpoint file, in the file's form, without the auxiliary head and in eval mode.

    Args:
        path: a file of `save_segmentation`, or a file of mmsegmentation 0.x with a RepLKNet and 150 or 19 classes, such
            as the official ones. `described` recognises the latter by keys and shapes.
        dtype: dtype of the network; None: the file's.

    Returns:
        The network on the CPU and its description.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no such network.
    """
    return network_of(read(path), dtype)


def network_of(source: Source, dtype: torch.dtype | None = None) -> tuple[UperNet, SegmentationDescription]:
    """The network of a file that was read, and its description; see `load_segmentation`."""
    text = source.texts.get(FIELD)
    with reading(source.path, NETWORK):
        known = None if text is None else parsed(text, SegmentationDescription)
        description = known or described(source.state, shown(source.path))
        with torch.device("meta"):
            model = without_auxiliary(description.build())
        state = {key: value for key, value in source.state.items() if not key.startswith("auxiliary_head.")}
        return filled(model, state, source.path, "UperNet").to(dtype), description


# the official networks: number of classes -> data set, scale of its images, align_corners
_OFFICIAL = {150: ("ade20k", (2048, 512), False), 19: ("cityscapes", (2049, 1025), True)}


def described(state: Mapping[str, Tensor], where: str = "the checkpoint") -> SegmentationDescription:
    """The description of an official network, from keys and shapes.

    The number of classes tells the data set: 150 for ADE20K, 19 for Cityscapes. On ADE20K, 31L and XL get windows of
    640. Of the two 31B networks on ADE20K, the one from ImageNet-22K needs windows of 640, too. But the file does not
    say which one it is, so the description has no windows.

    Args:
        state: tensors under our keys, as `read_state_dict` returns them.
        where: what the error calls the state.

    Raises:
        CheckpointError: the keys do not belong to a UperNet on a RepLKNet, or the number of classes is another.
    """
    head = "decode_head.classifier.weight"
    backbone = official_backbone(state, "backbone.model.", where) if head in state else None
    if backbone is None:
        raise CheckpointError(
            f"{where} holds no UperNet over a RepLKNet: expected keys such as decode_head.conv_seg.weight and "
            f"backbone.stem.0.conv.weight, got {listed(state, 4)}{hint(state)}"
        )
    classes = state[head].shape[0]
    if classes not in _OFFICIAL:
        raise CheckpointError(
            f"{where} has {classes} classes and does not say which: expected 150, of ADE20K, or 19, of Cityscapes; "
            "build a UperNet, load the file with replknet.load_checkpoint, and write it with save_segmentation"
        )
    dataset, scale, align_corners = _OFFICIAL[classes]
    auxiliary = state.get("auxiliary_head.convs.0.conv.weight")
    windows = classes == 150 and backbone.channels[0] > 128
    colours = shipped_classes(dataset)
    return SegmentationDescription(
        backbone=backbone.name,
        network=backbone.network,
        classes=colours.names,
        palette=colours.palette,
        channels=state[head].shape[1],
        auxiliary_channels=None if auxiliary is None else auxiliary.shape[0],
        align_corners=align_corners,
        scale=scale,
        window=640 if windows else None,
        stride=426 if windows else None,
        mean=backbone.mean,
        std=backbone.std,
    )


FILES = Files(load=network_of, save=save_segmentation)
