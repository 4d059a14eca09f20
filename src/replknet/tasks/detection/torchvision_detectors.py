"""torchvision's FCOS and Mask R-CNN on any backbone with features, with the interface of our own detectors."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from replknet.tasks.detection.batches import batched, objects
from replknet.tasks.detection.pyramid import Pyramid


def torchvision_fcos(backbone: nn.Module, num_classes: int, channels: int = 256) -> nn.Module:
    """torchvision's FCOS on a feature pyramid of strides 8 to 128: a newer recipe, which official weights do not fit.

    It differs from our FCOS in training and in thresholds. Only points near the middle of a box learn it, with the GIoU
    loss. Centerness comes from the tower of the boxes, and there are no learned scales. The score is
    sqrt(class * centerness) and must exceed 0.2; NMS is at 0.6.

    Args:
        backbone: a timm model with `features_only=True`; its features from stride 8 on have strides 8, 16 and 32.
        num_classes: number of classes.
        channels: channels of the pyramid and the head, a multiple of 32.

    Returns:
        A network with the interface of `replknet.tasks.detection.fcos.FCOS`.

    Raises:
        ValueError: the backbone lacks features of strides 8, 16 and 32, or 32 does not divide the channels.
    """
    if channels % 32:
        raise ValueError(f"torchvision's head has 32 groups of channels: expected a multiple of 32, got {channels}")
    levels = _levels(Pyramid(backbone, finest=8, channels=channels, extra="convs"), (8, 16, 32, 64, 128))
    return _prepared(_FCOS(levels, num_classes))


def mask_rcnn(backbone: nn.Module, num_classes: int, channels: int = 256) -> nn.Module:
    """torchvision's Mask R-CNN with its own heads and settings on a feature pyramid of strides 4 to 64.

    Args:
        backbone: a timm model with `features_only=True`; its features from stride 4 on have strides 4, 8, 16 and 32.
        num_classes: number of classes.
        channels: channels of the pyramid.

    Returns:
        A network with the interface of our CascadeRCNN; its losses have torchvision's names.

    Raises:
        ValueError: the backbone lacks features of strides 4, 8, 16 and 32.

    Source: He et al. 2017, "Mask R-CNN", arXiv:1703.06870, as torchvision implements it.
    """
    levels = _levels(Pyramid(backbone, channels=channels), (4, 8, 16, 32, 64))
    return _prepared(_MaskRCNN(levels, num_classes + 1))


class _FCOS(FCOS):
    """torchvision's FCOS with the names of our losses."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if not self.training:
            return super().forward(images)
        found = super().forward(images, objects(images, targets, masks=False))
        names = {"cls": "classification", "bbox": "bbox_regression", "centerness": "bbox_ctrness"}
        return {f"loss_{ours}": found[theirs] for ours, theirs in names.items()}


class _MaskRCNN(MaskRCNN):
    """torchvision's Mask R-CNN, with labels that count from 0 and masks without a channel."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training:
            wanted = objects(images, targets, masks=True)
            return super().forward(images, [target | {"labels": target["labels"] + 1} for target in wanted])
        found: list[dict[str, Tensor]] = super().forward(images)
        return [image | {"labels": image["labels"] - 1, "masks": image["masks"][:, 0]} for image in found]


class _Levels(nn.Module):
    """A pyramid with torchvision's names of the levels, in float32, since torchvision computes boxes in their dtype."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.out_channels = pyramid.out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = zip(("0", "1", "2", "3", "pool"), self.pyramid(x), strict=True)
        return OrderedDict((name, level.float()) for name, level in levels)


def _levels(pyramid: Pyramid, strides: tuple[int, ...]) -> _Levels:
    if pyramid.strides != strides:
        raise ValueError(
            f"torchvision's detector has levels of strides {', '.join(map(str, strides))}, got "
            f"{', '.join(map(str, pyramid.strides))}"
        )
    return _Levels(pyramid)


class _AsGiven(GeneralizedRCNNTransform):
    """Makes a batch of images at their own sizes; torchvision's own transform always resizes them in eval mode."""

    def forward(
        self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        return ImageList(*batched(images)), targets


def _prepared(model: nn.Module) -> nn.Module:
    """The detector without resizing, with losses and boxes in float32 even under autocast."""
    # `_AsGiven` uses none of these sizes and statistics
    model.transform = _AsGiven(800, 1333, [0.0] * 3, [1.0] * 3)
    modules = dict(model.named_modules())
    for name in ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
        if name in modules:
            modules[name].register_forward_hook(_float32)
    return model


def _float32(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: x.float() for name, x in output.items()}
    return type(output)(_float32(_module, (), x) for x in output)
