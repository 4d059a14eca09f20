"""Classifiers as files for other runtimes, with everything in them that is needed to use them.

A file is the merged network in float32 for any batch and any height and width from its last stride on. Its depthwise
convolutions are standard ones, so it runs the runtime's own. No file is kept that does not compute what torch does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from replknet.deploy.files import (
    BOUND,
    ENDINGS,
    LARGEST_SIDE,
    Format,
    format_of,
    is_exported,
    opened,
    sides_of,
    write_checked,
)
from replknet.deploy.verify import Difference
from replknet.models import Description
from replknet.models.timm_model import StagedNet
from replknet.nn import merge

__all__ = [
    "BOUND",
    "ENDINGS",
    "Card",
    "Exported",
    "Format",
    "card_of",
    "export_classifier",
    "format_of",
    "is_exported",
]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What stands in an exported file beside the network.

    Args:
        name: of the network.
        classes: names of the outputs; empty where unknown.
        num_classes: number of outputs.
        image_size: side in pixels to which images are prepared.
        crop_pct: share of the resized image that the centre crop takes.
        crop_mode: "center" for a centre crop, "squash" for a warp to the size.
        interpolation: of the resize.
        mean: per channel, for values from 0 to 1 in RGB.
        std: per channel.
        sides: smallest and largest side of an image that the file takes, pixels.
        task: what the network does.
        input: what the network takes, in words.
        licence: of the weights, or "unknown".
        made_by: this package and its version.
    """

    name: str
    classes: tuple[str, ...]
    num_classes: int
    image_size: int
    crop_pct: float
    crop_mode: Literal["center", "squash"]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sides: tuple[int, int] = (1, LARGEST_SIDE)
    task: str = "classification"
    input: str = "image: float32 [N,3,H,W], RGB, (value / 255 - mean) / std"
    licence: str = "unknown"
    made_by: str = ""


def card_of(description: Description, licence: str = "unknown") -> Card:
    """The card of a network, from its description."""
    squash = description.image_size >= 384
    return Card(
        name=description.name,
        classes=description.classes,
        num_classes=description.num_classes,
        image_size=description.image_size,
        crop_pct=1.0 if squash else description.crop_pct,
        crop_mode="squash" if squash else "center",
        interpolation="bicubic",
        mean=description.mean,
        std=description.std,
        licence=licence,
        made_by=f"replknet {version('replknet')}",
    )


def export_classifier(
    model: StagedNet, card: Card, path: str | Path, to: Format, examples: Sequence[Tensor] = ()
) -> Difference:
    """Write a classifier, merged, in float32, and keep the file if it computes what torch does.

    Args:
        model: a network of ours in any form, of any dtype and on any device; it stays as it was.
        card: what else the file holds.
        path: ends as `ENDINGS` says. An existing file is replaced only by one that was checked.
        to: the format: ONNX (opset 20), OpenVINO (an .xml with a .bin beside it), torch.export, or AOTInductor, which
            is compiled for this machine.
        examples: prepared images `[N,3,H,W]` on which it is checked, beside random ones of two other sizes.

    Returns:
        The largest difference from torch's logits in the file's runtime on the CPU; `BOUND` is allowed.

    Raises:
        ValueError: another ending, or examples of another shape or dtype.
        RuntimeError: the file differs more; none is left.
    """
    stride = int(model.feature_info[-1]["reduction"])
    network = merge(model).float().cpu().eval()
    card = replace(card, sides=sides_of(stride))
    return write_checked(network, stride, asdict(card), Path(path), to, examples)


class Exported(nn.Module):
    """A classifier in a file, run by the file's own runtime.

    Args:
        path: a file of `export_classifier`.

    Input: `[N,3,H,W]`, float32, on the CPU.
    Output: logits `[N,classes]`; an image whose sides are not those of the card is a ValueError.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending is not one of `ENDINGS`, it has no card of ours, or it is no classifier.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        fields, self._run = opened(Path(path), "classification")
        self.card = Card(**fields)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]
