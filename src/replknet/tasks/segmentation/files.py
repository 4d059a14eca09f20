"""Segmentation networks in files: ours say what they are of, the official ones are understood from their keys."""

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
from replknet.models.model_files import Source, filled, parsed, read, write
from replknet.tasks.backbone import official_backbone
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary
from replknet.tasks.task import Files

# key of the description in the header of a file
FIELD = "replknet_segmentation"


@dataclass(frozen=True, kw_only=True)
class SegmentationDescription:
    """What a file of weights is of, and how its network is fed.

    Args:
        backbone: timm's name of the backbone.
        network: its options, such as kernels, as timm.create_model takes them.
        classes: names of the classes.
        palette: their colours, RGB.
        channels: of UperNet's head.
        auxiliary_channels: of the auxiliary head; None where there is none.
        align_corners: of every interpolation.
        scale: longer and shorter side into which an image is fitted, pixels; None for its own size.
        window: side of the windows of a large image, pixels; None for the whole image at once.
        stride: of the windows, pixels.
        mean: per channel, for values from 0 to 1 in RGB.
        std: per channel.
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

    @property
    def colours(self) -> Classes:
        return Classes(self.classes, self.palette)

    def build(self, **options: Any) -> UperNet:
        """The network, untrained; options are the backbone's beside its own."""
        backbone = timm.create_model(self.backbone, features_only=True, **self.network, **options)
        return UperNet(backbone, len(self.classes), self.channels, self.auxiliary_channels, self.align_corners)

    @property
    def name(self) -> str:
        """timm's name of the backbone."""
        return self.backbone

    @property
    def normalize(self) -> Normalize:
        """What an image goes through before the network."""
        return Normalize(self.mean, self.std)


def save_segmentation(model: nn.Module, path: str | Path, description: SegmentationDescription) -> None:
    """Write a network to a safetensors file; an existing file is replaced only when all is written.

    Args:
        model: a UperNet in any form: training, merged or folded, with its auxiliary head or without.
        path: the file; its folder is made.
        description: what is needed to build and feed it, written into the file's header.
    """
    write(model, path, {FIELD: json.dumps(asdict(description))})


def load_segmentation(path: str | Path, dtype: torch.dtype | None = None) -> tuple[UperNet, SegmentationDescription]:
    """The network of a checkpoint file, in the file's form, without the auxiliary head and in eval mode.

    Args:
        path: a file of `save_segmentation`, or one of mmsegmentation 0.x with a RepLKNet and 150 or 19 classes, as the
            official ones are; what the latter is of and how it is fed is understood from keys and shapes (`described`).
        dtype: of the network; None for that of the file.

    Returns:
        The network on the CPU and its description.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds no such network.
    """
    return network_of(read(path), dtype)


def network_of(source: Source, dtype: torch.dtype | None = None) -> tuple[UperNet, SegmentationDescription]:
    """The network of a file that was read, and its description; see `load_segmentation`."""
    text, where = source.texts.get(FIELD), source.path
    description = described(source.state, str(where)) if text is None else parsed(text, where, SegmentationDescription)
    with torch.device("meta"):
        model = without_auxiliary(description.build())
    state = {key: value for key, value in source.state.items() if not key.startswith("auxiliary_head.")}
    return filled(model, state, source.path, "UperNet").to(dtype), description


# classes of a pixel -> data set, the scale of its images, and whether corners are aligned, in the official networks
_OFFICIAL = {150: ("ade20k", (2048, 512), False), 19: ("cityscapes", (2049, 1025), True)}


def described(state: Mapping[str, Tensor], where: str = "the checkpoint") -> SegmentationDescription:
    """The description of an official network, from keys and shapes.

    The data set is the one with as many classes: ADE20K with 150, Cityscapes with 19. Windows of 640 are those of 31L
    and XL; the two networks of 31B on ADE20K cannot be told apart, and the one of ImageNet-22K wants them, too.

    Args:
        state: under our keys, as `read_state_dict` gives it.
        where: what the error calls it.

    Raises:
        CheckpointError: the keys are not those of UperNet over a RepLKNet, or the classes those of another data set.
    """
    head = "decode_head.classifier.weight"
    backbone = official_backbone(state, "backbone.model.", where) if head in state else None
    if backbone is None:
        raise CheckpointError(
            f"{where} holds no UperNet over a RepLKNet: expected keys such as decode_head.conv_seg.weight and "
            f"backbone.stem.0.conv.weight, got {', '.join(list(state)[:4])}, ..."
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
