"""Files of detectors. Ours have a description; the official ones are recognised by their keys."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from replknet import limits
from replknet.data.coco import shipped_classes
from replknet.data.mask_transforms import Normalize
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
from replknet.tasks.detection.cascade import CascadeRCNN
from replknet.tasks.detection.fcos import FCOS
from replknet.tasks.detection.torchvision_detectors import mask_rcnn, torchvision_fcos
from replknet.tasks.task import Files

# key of the description in the header of a file
FIELD = "replknet_detection"


@dataclass(frozen=True, kw_only=True)
class DetectionDescription:
    """Which detector a file of weights belongs to, and which images the detector expects.

    Args:
        detector: "fcos", "torchvision_fcos", "mask_rcnn", "cascade_rcnn" or "cascade_mask_rcnn".
        backbone: timm's name of the backbone.
        network: options of the backbone, such as kernels, as timm.create_model takes them.
        classes: names of the classes.
        channels: channels of the pyramid and the heads.
        scale: longer and shorter side that an image is fitted into, pixels.
        mean: mean of each channel in RGB, for values from 0 to 1.
        std: standard deviation of each channel in RGB, for values from 0 to 1.

    Raises:
        ValueError: a size is not positive, or beyond what `replknet.limits` allows; or the backbone is no network of
            timm's, or has options that fetch other files.
    """

    detector: str
    backbone: str
    network: dict[str, Any]
    classes: tuple[str, ...]
    channels: int
    scale: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        check_backbone(self.backbone, self.network)
        check_pixels(self.mean, self.std)
        check_classes(self.classes)
        check_sizes(self.channels, *self.scale)

    @property
    def masks(self) -> bool:
        """Whether the detector finds masks."""
        return "mask" in self.detector

    @property
    def name(self) -> str:
        """timm's name of the backbone."""
        return self.backbone

    @property
    def normalize(self) -> Normalize:
        """The last step of an image before the network."""
        return Normalize(self.mean, self.std)

    def build(self, **options: Any) -> nn.Module:
        """The detector, untrained; `options` are further options of the backbone.

        Raises:
            ValueError: there is no such detector, or the backbone does not fit it.
        """
        backbone = timm.create_model(self.backbone, features_only=True, **self.network, **options)
        classes, channels = len(self.classes), self.channels
        match self.detector:
            case "fcos":
                return FCOS(backbone, classes, channels)
            case "torchvision_fcos":
                return torchvision_fcos(backbone, classes, channels)
            case "mask_rcnn":
                return mask_rcnn(backbone, classes, channels)
            case "cascade_rcnn" | "cascade_mask_rcnn":
                return CascadeRCNN(backbone, classes, self.masks, channels)
            case _:
                raise ValueError(f"no detector is called {self.detector!r}")


def save_detection(model: nn.Module, path: str | Path, description: DetectionDescription) -> None:
    """Write a detector to a safetensors file. An existing file is replaced only after the new one is complete.

    Args:
        model: a detector in any form: training, merged or folded.
        path: the file; a missing folder is created.
        description: how to build the detector again and how to feed it; it goes into the file's header.
    """
    write(model, path, {FIELD: json.dumps(asdict(description))})


def load_detection(path: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, DetectionDescription]:
    """The detector of a checkpoint file, in the file's form and in eval mode.

    Args:
        path: a file of `save_detection`, or a file of mmdetection 2.x with a RepLKNet and the 80 classes of COCO, such
            as the official ones. `described` recognises the latter by keys and shapes.
        dtype: dtype of the detector; None: the file's.

    Returns:
        The detector on the CPU and its description.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no such detector.
    """
    return network_of(read(path), dtype)


def network_of(source: Source, dtype: torch.dtype | None = None) -> tuple[nn.Module, DetectionDescription]:
    """The detector of a file that was read, and its description; see `load_detection`."""
    text = source.texts.get(FIELD)
    with reading(source.path, NETWORK):
        known = None if text is None else parsed(text, DetectionDescription)
        description = known or described(source.state, shown(source.path))
        _check_room(description, source.state)
        # not on the meta device: building the network computes torchvision's anchors
        model = filled(description.build(), source.state, source.path, description.detector)
        return model.to(dtype), description


def _check_room(description: DetectionDescription, state: Mapping[str, Tensor]) -> None:
    """Refuse a description of a network that is much larger than its file, before it takes memory."""
    with torch.device("meta"):
        needed = sum(p.numel() for p in description.build().parameters())
    limits.check(needed, 2 * sum(value.numel() for value in state.values()), "weights, for the number in the file")


def described(state: Mapping[str, Tensor], where: str = "the checkpoint") -> DetectionDescription:
    """The description of an official detector, from keys and shapes.

    Args:
        state: tensors under our keys, as `read_state_dict` returns them.
        where: what the error calls the state.

    Raises:
        CheckpointError: the keys do not belong to FCOS or Cascade R-CNN on a RepLKNet, or the number of classes is not
            COCO's.
    """
    fcos, cascade = state.get("bbox_head.conv_cls.weight"), state.get("bbox_head.0.fc_cls.weight")
    heads = fcos is not None or cascade is not None
    backbone = official_backbone(state, "pyramid.backbone.model.", where) if heads else None
    if backbone is None:
        raise CheckpointError(
            f"{where} holds no detector over a RepLKNet: expected keys such as backbone.stem.0.conv.weight and "
            f"bbox_head.conv_cls.weight (FCOS) or roi_head.bbox_head.0.fc_cls.weight (Cascade R-CNN), got "
            f"{listed(state, 4)}{hint(state)}"
        )
    # the last output of a cascade's head is the background
    classes = fcos.shape[0] if fcos is not None else state["bbox_head.0.fc_cls.weight"].shape[0] - 1
    names = shipped_classes()
    if classes != len(names):
        raise CheckpointError(
            f"{where} has {classes} classes and does not say which: expected the {len(names)} of COCO; build the "
            "detector, load the file with replknet.load_checkpoint, and write it with save_detection"
        )
    masks = "mask_head.0.conv_logits.weight" in state
    return DetectionDescription(
        detector="fcos" if fcos is not None else "cascade_mask_rcnn" if masks else "cascade_rcnn",
        backbone=backbone.name,
        network=backbone.network,
        classes=names,
        channels=state["pyramid.neck.inner_blocks.0.0.weight"].shape[0],
        scale=(1333, 800),
        mean=backbone.mean,
        std=backbone.std,
    )


FILES = Files(load=network_of, save=save_detection)
