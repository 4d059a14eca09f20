"""Classifiers as files for other runtimes, with everything in them that is needed to use them.

A file is the merged network in float32 for any batch and any height and width from its last stride on. Its depthwise
convolutions are standard ones, so it runs the runtime's own. No file is kept that does not compute what torch does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from replknet.data import transforms
from replknet.deploy.files import BOUND, LARGEST_SIDE, Exported, Format, parsed_card, sides_of, write_checked
from replknet.deploy.verify import Difference, Run
from replknet.models import Description
from replknet.models.replknet import evaluation_crop
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.tasks.task import Export, Int8, Network


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
    crop_mode: str
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
    crop_mode, crop_pct = evaluation_crop(description.image_size, description.crop_pct)
    return Card(
        name=description.name,
        classes=description.classes,
        num_classes=description.num_classes,
        image_size=description.image_size,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
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


# ---- the task's record


def _write(network: Network, path: Path, to: Format, examples: Sequence[Image.Image], licence: str) -> Difference:
    card = card_of(network.description, licence)
    transform = transforms.eval_transform(card.image_size, card.mean, card.std, card.crop_pct)
    model: StagedNet = network.model  # type: ignore[assignment]  # a classifier of ours
    return export_classifier(model, card, path, to, [transform(image)[None] for image in examples])


def _open(path: Path, card: dict[str, Any], run: Run) -> tuple[Exported, Card]:
    return Exported(run), parsed_card(Card, card, path)


def _int8() -> Int8:
    from replknet.tasks.classification.int8 import INT8  # it exports a classifier itself

    return INT8


EXPORT = Export(
    write=_write,
    open=_open,
    compared="the logits of {images} images and of noise in two other sizes",
    bound=BOUND,
    int8=_int8,
)
