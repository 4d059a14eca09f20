"""Segmentation networks as files for other runtimes, with everything in them that is needed to use them.

A file is the merged network in float32, without the auxiliary head, for any batch and any height and width from its
last stride on. It gives logits of the image's size: windows, scales and the class of a pixel are the caller's, and the
card says which. No file is kept that does not compute what torch does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from replknet.data.images import pixels
from replknet.data.mask_transforms import fitted
from replknet.deploy.files import (
    BOUND,
    LARGEST_SIDE,
    Exported,
    Format,
    described_card,
    plain_card,
    sides_of,
    write_checked,
)
from replknet.deploy.verify import Difference, Run
from replknet.nn import merge
from replknet.tasks.segmentation.files import SegmentationDescription
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary
from replknet.tasks.task import Export, Network


@dataclass(frozen=True, kw_only=True)
class SegmentationCard:
    """What stands in an exported file beside the network; the fields of the description stand beside the others.

    Args:
        description: of the network: classes, their colours, mean and std, scale of an image, windows.
        sides: smallest and largest side of an image, or of a window, that the file takes, pixels.
        task: what the network does.
        input: what the network takes, in words.
        output: what it gives, in words.
        licence: of the weights, or "unknown".
        made_by: this package and its version.
    """

    description: SegmentationDescription
    sides: tuple[int, int] = (1, LARGEST_SIDE)
    task: str = "segmentation"
    input: str = "image: float32 [N,3,H,W], RGB, (value / 255 - mean) / std"
    output: str = "logits: float32 [N,classes,H,W], the largest of a pixel is its class"
    licence: str = "unknown"
    made_by: str = ""


def segmentation_card(description: SegmentationDescription, licence: str = "unknown") -> SegmentationCard:
    """The card of a network, from its description."""
    return SegmentationCard(description=description, licence=licence, made_by=f"replknet {version('replknet')}")


def export_segmenter(
    model: UperNet, card: SegmentationCard, path: str | Path, to: Format, examples: Sequence[Tensor] = ()
) -> Difference:
    """Write a segmentation network, merged, in float32, and keep the file if it computes what torch does.

    Args:
        model: in any form, of any dtype and on any device; it stays as it was.
        card: what else the file holds.
        path: ends as `replknet.deploy.files.ENDINGS` says. An existing file is replaced only by one that was checked.
        to: the format: ONNX (opset 20), OpenVINO (an .xml with a .bin beside it), torch.export, or AOTInductor, which
            is compiled for this machine.
        examples: prepared images `[N,3,H,W]` on which it is checked, beside random ones of two other sizes.

    Returns:
        The largest difference from torch's logits in the file's runtime on the CPU; `replknet.deploy.files.BOUND` is
        allowed.

    Raises:
        ValueError: another ending, examples of another shape or dtype, or a card of another number of classes.
        RuntimeError: the file differs more; none is left.
    """
    named = len(card.description.classes)
    if named != model.num_classes:
        raise ValueError(f"the card must name each of the network's {model.num_classes} classes, got {named}")
    stride = max(model.backbone.feature_info.reduction())  # type: ignore[operator,union-attr]  # of every such model
    network = without_auxiliary(merge(model)).float().cpu().eval()
    card = replace(card, sides=sides_of(stride))
    return write_checked(network, stride, plain_card(card), Path(path), to, examples)


def example_of(image: Image.Image, description: SegmentationDescription) -> Tensor:
    """An image in RGB as the network is given it: fitted into the scale, and the first of its windows `[1,3,H,W]`."""
    x = description.normalize(pixels(image))[None]
    if description.scale is not None:
        size = fitted(image.height, image.width, *description.scale)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x[:, :, : description.window, : description.window]


# ---- the task's record


def _write(network: Network, path: Path, to: Format, examples: Sequence[Image.Image], licence: str) -> Difference:
    card = segmentation_card(network.description, licence)
    prepared = [example_of(image, network.description) for image in examples]
    return export_segmenter(network.model, card, path, to, prepared)  # type: ignore[arg-type]  # a UperNet


def _open(path: Path, card: dict[str, Any], run: Run) -> tuple[Exported, SegmentationDescription]:
    return Exported(run), described_card(SegmentationCard, SegmentationDescription, card, path).description


EXPORT = Export(
    write=_write,
    open=_open,
    compared="the logits of {images} images and of noise in two other sizes",
    bound=BOUND,
)
