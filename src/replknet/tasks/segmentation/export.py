"""Files of segmentation networks for other runtimes. A card in each file says how to use it.

A file holds the merged network in float32, without the auxiliary head, for any batch size, height and width above its
last stride. It returns logits in the size of the image. Windows, scales and the choice of a pixel's class are left to
the caller; the card has their values. A file is kept only if it computes what torch computes.
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
from replknet.deploy.cards import LARGEST_SIDE, check_sides, described_card, plain_card
from replknet.deploy.files import BOUND, Exported, Format, sides_of, write_checked
from replknet.deploy.verify import Difference, Run
from replknet.nn import merge
from replknet.tasks.segmentation.files import SegmentationDescription
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary
from replknet.tasks.task import Export, Network


@dataclass(frozen=True, kw_only=True)
class SegmentationCard:
    """What an exported file says about its network. In the file, the description's fields are fields of the card.

    Args:
        description: classes, their colours, mean and std, scale of an image, windows.
        sides: smallest and largest side of an image or window that the file takes, pixels.
        task: what the network does.
        input: what the network takes, in words.
        output: what the network returns, in words.
        licence: licence of the weights, or "unknown".
        made_by: this package and its version.

    Raises:
        ValueError: a value is one that no network has, or beyond `replknet.limits`.
    """

    description: SegmentationDescription
    sides: tuple[int, int] = (1, LARGEST_SIDE)
    task: str = "segmentation"
    input: str = "image: float32 [N,3,H,W], RGB, (value / 255 - mean) / std"
    output: str = "logits: float32 [N,classes,H,W], the largest of a pixel is its class"
    licence: str = "unknown"
    made_by: str = ""

    def __post_init__(self) -> None:
        check_sides(self.sides)


def segmentation_card(description: SegmentationDescription, licence: str = "unknown") -> SegmentationCard:
    """The card of the network with this description.

    Args:
        description: the network, and the preparation of its images.
        licence: licence of the weights.

    Returns:
        The card, with the version of this package.
    """
    return SegmentationCard(description=description, licence=licence, made_by=f"replknet {version('replknet')}")


def export_segmenter(
    model: UperNet, card: SegmentationCard, path: str | Path, to: Format, examples: Sequence[Tensor] = ()
) -> Difference:
    """Write a segmentation network, merged, in float32. The file is kept if it computes what torch computes.

    Args:
        model: a UperNet in any form, any dtype and on any device; it stays unchanged.
        card: the card for the file.
        path: ends as `replknet.deploy.files.ENDINGS` says. A checked file replaces an existing one.
        to: the format: ONNX (opset 20), OpenVINO (an .xml with a .bin beside it), torch.export, or AOTInductor, which
            is compiled for this machine.
        examples: prepared images `[N,3,H,W]` for the check. Random images of two other sizes are checked, too.

    Returns:
        The largest difference of the logits from torch's, in the file's runtime on the CPU; at most
        `replknet.deploy.files.BOUND`.

    Raises:
        ValueError: the path has another ending, an example another shape or dtype, or the card another number of
            classes.
        RuntimeError: the file differs more; it is removed.
    """
    named = len(card.description.classes)
    if named != model.num_classes:
        raise ValueError(f"the card must name each of the network's {model.num_classes} classes, got {named}")
    stride = max(model.backbone.feature_info.reduction())  # type: ignore[operator,union-attr]  # of every such model
    network = without_auxiliary(merge(model)).float().cpu().eval()
    card = replace(card, sides=sides_of(stride))
    return write_checked(network, stride, plain_card(card), Path(path), to, examples)


def example_of(image: Image.Image, description: SegmentationDescription) -> Tensor:
    """The network's input `[1,3,H,W]` for an image in RGB: normalised, fitted into the scale, its first window."""
    x = description.normalize(pixels(image))[None]
    if description.scale is not None:
        size = fitted(image.height, image.width, *description.scale)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x[:, :, : description.window, : description.window]


def _write(network: Network, path: Path, to: Format, examples: Sequence[Image.Image], licence: str) -> Difference:
    card = segmentation_card(network.description, licence)
    prepared = [example_of(image, network.description) for image in examples]
    return export_segmenter(network.model, card, path, to, prepared)  # type: ignore[arg-type]  # a UperNet


def _open(path: Path, card: dict[str, Any], run: Run) -> tuple[Exported, SegmentationDescription]:
    found = described_card(SegmentationCard, SegmentationDescription, card, path).description
    classes = len(found.classes)
    return Exported(run, lambda shape: (shape[0], classes, *shape[2:])), found


EXPORT = Export(
    write=_write,
    open=_open,
    compared="the logits of {images} images and of noise in two other sizes",
    bound=BOUND,
)
