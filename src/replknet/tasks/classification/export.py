"""Files of classifiers for other runtimes. A card in each file says how to use it.

A file holds the merged network in float32, for any batch size, height and width above its last stride. Depthwise layers
are standard convolutions, so the runtime uses its own kernels. A file is kept only if it computes what torch computes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from replknet import limits
from replknet.data import transforms
from replknet.deploy.cards import LARGEST_SIDE, check_sides, parsed_card
from replknet.deploy.files import BOUND, Exported, Format, sides_of, write_checked
from replknet.deploy.verify import Difference, Run
from replknet.models import Description
from replknet.models.replknet import evaluation_crop
from replknet.models.sizes import check_classes, check_pixels
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.tasks.task import Export, Int8, Network


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an exported file says about its network.

    Args:
        name: name of the network.
        classes: names of the outputs; empty if unknown.
        num_classes: number of outputs.
        image_size: side of a prepared image, pixels.
        crop_pct: side of the centre crop divided by the side of the resized image.
        crop_mode: "center" for a centre crop, "squash" for a warp to the size.
        interpolation: interpolation of the resize.
        mean: mean of each channel in RGB, for values from 0 to 1.
        std: standard deviation of each channel in RGB, for values from 0 to 1.
        sides: smallest and largest side of an image that the file takes, pixels.
        task: what the network does.
        input: what the network takes, in words.
        licence: licence of the weights, or "unknown".
        made_by: this package and its version.

    Raises:
        ValueError: a size is out of its range, or beyond what `replknet.limits` allows.
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

    def __post_init__(self) -> None:
        check_classes(self.classes)
        limits.check(self.num_classes, limits.CLASSES, "classes")
        if self.num_classes < 1 or len(self.classes) not in (0, self.num_classes):
            raise ValueError(f"it names {len(self.classes)} of {self.num_classes} classes")
        limits.check(self.image_size, limits.SIDE, "pixels in the side of an image")
        if self.image_size < 1 or not 0.1 <= self.crop_pct <= 1:
            raise ValueError(f"it crops {self.crop_pct:g} of an image to {self.image_size} pixels")
        check_sides(self.sides)
        check_pixels(self.mean, self.std)


def card_of(description: Description, licence: str = "unknown") -> Card:
    """The card of the network with this description.

    Args:
        description: the network, and the preparation of its images.
        licence: licence of the weights.

    Returns:
        The card, with the version of this package.
    """
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
    """Write a classifier, merged, in float32. The file is kept if it computes what torch computes.

    Args:
        model: a classifier of replknet's in any form, any dtype and on any device; it stays unchanged.
        card: the card for the file.
        path: ends as `replknet.deploy.files.ENDINGS` says. A checked file replaces an existing one.
        to: the format: ONNX (opset 20), OpenVINO (an .xml with a .bin beside it), torch.export, or AOTInductor, which
            is compiled for this machine.
        examples: prepared images `[N,3,H,W]` for the check. Random images of two other sizes are checked, too.

    Returns:
        The largest difference of the logits from torch's, in the file's runtime on the CPU; at most `BOUND`.

    Raises:
        ValueError: the path has another ending, or an example another shape or dtype.
        RuntimeError: the file differs more; it is removed.
    """
    stride = int(model.feature_info[-1]["reduction"])
    network = merge(model).float().cpu().eval()
    card = replace(card, sides=sides_of(stride))
    return write_checked(network, stride, asdict(card), Path(path), to, examples)


def _write(network: Network, path: Path, to: Format, examples: Sequence[Image.Image], licence: str) -> Difference:
    card = card_of(network.description, licence)
    transform = transforms.eval_transform(card.image_size, card.mean, card.std, card.crop_pct)
    model: StagedNet = network.model  # type: ignore[assignment]  # a classifier of ours
    return export_classifier(model, card, path, to, [transform(image)[None] for image in examples])


def _open(path: Path, card: dict[str, Any], run: Run) -> tuple[Exported, Card]:
    found = parsed_card(Card, card, path)
    return Exported(run, lambda shape: (shape[0], found.num_classes)), found


def _int8() -> Int8:
    from replknet.tasks.classification.int8 import INT8  # int8.py imports this module

    return INT8


EXPORT = Export(
    write=_write,
    open=_open,
    compared="the logits of {images} images and of noise in two other sizes",
    bound=BOUND,
    int8=_int8,
)
