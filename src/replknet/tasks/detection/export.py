"""Files of detectors for other runtimes: the feature pyramid in every format, the whole detector as ONNX.

A file is kept only if it computes what torch computes. All its nodes are standard: the depthwise operator becomes a
plain convolution.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from replknet.data.box_transforms import ForEvaluation, Targets, rescaled
from replknet.data.images import pixels
from replknet.deploy.cards import ExportedError, check_sides, described_card, plain_card
from replknet.deploy.files import Format, add_card, check_outputs
from replknet.deploy.programs import open_pt2, save_pt2
from replknet.deploy.verify import (
    Difference,
    Run,
    compared,
    in_onnxruntime,
    in_openvino,
    kept,
    worst,
)
from replknet.nn import merge
from replknet.tasks.detection.batches import batched
from replknet.tasks.detection.files import DetectionDescription
from replknet.tasks.detection.pyramid import Pyramid
from replknet.tasks.task import Export, Network

# largest relative L2 difference from torch in float32; on small networks we measured less than 1e-6
BOUND = 1e-5  # for each level of a pyramid
BOUNDS = {
    "boxes": 1e-4,
    "scores": 1e-4,
    # masks are pasted at whole pixels: a corner that rounds the other way moves a mask by one pixel
    "masks": 2e-2,
}

# outputs of a detector, in the order of its file
_NAMES = ("boxes", "labels", "scores", "masks")
# the sides of an image are multiples of this, pixels
_DIVISOR = 32
_WAY_OUT = "The way out is export_pyramid: it writes backbone and pyramid in every format"
# torch's newer exporter takes no detector, and the older one warns of torchvision's code
_EXPECTED_WARNINGS = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    ".*torch.jit.script. is deprecated",
    "To copy construct from a tensor",
    "Constant folding - Only steps=1",
    # wrong for negative indices only, and a detector has none
    "Exporting aten::index operator of advanced indexing",
)
# ending -> why a whole detector is not written to such a file
_REFUSED = {
    ".pt2": "torch.export refuses sizes that depend on the image, such as the number of boxes ('Could not guard on "
    "data-dependent expression')",
    ".xml": "OpenVINO cannot read the loop that pastes masks, and its conversion of torch's trace may give wrong "
    "masks. It reads the .onnx of a detector without masks",
}

_Program = torch.export.ExportedProgram
_Writer = Callable[[_Program, list[str], Path], None]
_Reader = Callable[[Path], Run]


def export_pyramid(model: nn.Module, path: str | Path, example: Tensor) -> Difference:
    """Write the backbone of a detector with its feature pyramid, merged, in float32, for images of any size.

    The file takes a batch `image` `[N,3,H,W]`. It returns the levels `stride_8`, `stride_16` and so on; .pt2 and .xml
    have no names, only this order. H and W are multiples of 32, and at least the last stride plus 32 pixels.

    Args:
        model: a detector, or only its `Pyramid`, of any dtype and on any device; it stays unchanged.
        path: ends in `.onnx` (opset 20), `.pt2` (torch.export) or `.xml` (OpenVINO, with a `.bin` beside it). A checked
            file replaces an existing one.
        example: an image for the check `[1,3,H,W]`, float32, normalised. A random batch of two images is checked, too;
            its size differs from the traced size.

    Returns:
        The largest difference from torch, in the file's runtime on the CPU; at most `BOUND`.

    Raises:
        ValueError: the path has another ending, the model no pyramid, or the example another shape, dtype or size.
        RuntimeError: the file differs more; it is removed.
    """
    path = Path(path)
    if path.suffix not in _ROADS:
        raise ValueError(f"a pyramid is exported to a file that ends in {', '.join(_ROADS)}, got {path.name}")
    pyramid = merge(_pyramid(model)).float().cpu().eval()
    smallest = pyramid.strides[-1] + _DIVISOR
    _check(example, 4, "image [1,3,H,W]")
    if example.shape[0] != 1 or any(side % _DIVISOR or side < smallest for side in example.shape[2:]):
        raise ValueError(
            f"expected one image with sides that are multiples of {_DIVISOR} and at least {smallest}, got "
            f"{list(example.shape)}: pad it as replknet.tasks.detection.batches.batched does"
        )
    other = torch.randn(2, 3, smallest + 96, smallest + 64, generator=torch.Generator().manual_seed(0))
    write, runtime = _ROADS[path.suffix]
    found = []
    with torch.no_grad(), kept(path) as part:
        write(_program(pyramid, smallest), [f"stride_{stride}" for stride in pyramid.strides], part)
        run = runtime(part)
        for x in (example.cpu(), other):
            for stride, wanted, got in zip(pyramid.strides, pyramid(x), run(x), strict=True):
                found.append(compared(f"the level of stride {stride}", wanted, got, BOUND))
    return worst(found)


def export_detector(
    model: nn.Module, path: str | Path, example: Tensor, card: Mapping[str, Any] | None = None
) -> Difference:
    """Write a whole detector, merged, in float32, as ONNX for single images of one size.

    The file takes `image` `[3,H,W]`. It returns `boxes` `[n,4]` (pixels), `labels` `[n]`, `scores` `[n]`, best first,
    and `masks` `[n,H,W]` if the detector has masks. If two boxes are equal up to rounding, the file and torch may keep
    different ones.

    Args:
        model: a detector of replknet's, of any dtype and on any device; it stays unchanged.
        path: ends in `.onnx` (opset 17, by torch's older exporter). A checked file replaces an existing one.
        example: an image `[3,H,W]`, float32, normalised, in which the detector finds something. The file takes images
            of its size. Its mirror image and an empty image are checked, too.
        card: further content of the file, ready for JSON; None: nothing.

    Returns:
        The largest difference from torch, in onnxruntime on the CPU; at most `BOUNDS`. The labels are equal.

    Raises:
        ValueError: the path has another ending; the model is no detector, or has a layer that ONNX lacks; the example
            has another shape or dtype, or no object.
        RuntimeError: the file finds something else; it is removed.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        reason = _REFUSED.get(path.suffix, "this ending is unknown")
        raise ValueError(f"a whole detector is exported to .onnx, got {path.name}: {reason}. {_WAY_OUT}")
    if _pyramid(model) is model:
        raise ValueError("expected a detector, got only a pyramid: export_pyramid writes it")
    _check(example, 3, "image [3,H,W]")
    detector = _OneImage(merge(model).float().cpu()).eval()
    example = example.cpu()
    found = []
    with torch.no_grad(), kept(path) as part:
        outputs = detector(example)
        if len(outputs[0]) == 0:
            raise ValueError("the detector finds nothing in the example: for a check, give an image with objects")
        names = _NAMES[: len(outputs)]
        _write_detector(detector, example, names, part)
        if card is not None:
            add_card(part, card)
        run = in_onnxruntime(part)
        for x in (example, example.flip(2), torch.zeros_like(example)):
            wanted, got = (dict(zip(names, outputs, strict=True)) for outputs in (detector(x), run(x)))
            # scores in their order; equal scores may belong to other boxes, which `_nearest` pairs
            found.append(compared("scores", wanted["scores"], got["scores"], BOUNDS["scores"]))
            order = _nearest(wanted, got)
            found += [compared(name, wanted[name], got[name][order], BOUNDS.get(name, 0.0)) for name in names]
    return worst(found)


class _OneImage(nn.Module):
    """A detector for a single image, with results in a fixed order."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([image])
        return tuple(found[name] for name in _NAMES if name in found)


def _pyramid(model: nn.Module) -> Pyramid:
    found = [module for module in model.modules() if isinstance(module, Pyramid)]
    if len(found) != 1:
        raise ValueError(f"expected a detector with one feature pyramid, got a {type(model).__name__}")
    return found[0]


def _check(example: Tensor, dimensions: int, expected: str) -> None:
    if example.ndim != dimensions or example.shape[-3] != 3 or example.dtype != torch.float32:
        raise ValueError(f"expected an {expected} in float32, got {list(example.shape)} in {example.dtype}")


def _program(pyramid: Pyramid, smallest: int) -> _Program:
    """The graph for any batch and sides that are multiples of 32.

    The sides start at `smallest`: torch refuses a range in which a level has a side of one.
    """
    traced = torch.zeros(2, 3, smallest, smallest + _DIVISOR)
    height, width = (torch.export.Dim(name, min=smallest // _DIVISOR) for name in ("height", "width"))
    shapes = {0: torch.export.Dim("batch"), 2: _DIVISOR * height, 3: _DIVISOR * width}
    return torch.export.export(pyramid, (traced,), dynamic_shapes=(shapes,))


def _write_onnx(program: _Program, levels: list[str], path: Path) -> None:
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=levels)
    assert exported is not None
    exported.save(path)


def _write_openvino(program: _Program, _levels: list[str], path: Path) -> None:
    import openvino

    # else the weights are rounded to float16
    openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)


def _write_detector(detector: _OneImage, example: Tensor, names: tuple[str, ...], path: Path) -> None:
    with warnings.catch_warnings():
        for text in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", text)
        # sizes become constants, since the file is for one size; the check finds other values that became constants
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        try:
            torch.onnx.export(
                detector,
                (example,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["image"],
                output_names=list(names),
                dynamic_axes={name: {0: "objects"} for name in names},
            )
        except torch.onnx.errors.UnsupportedOperatorError as error:
            raise ValueError(f"the detector has a layer that ONNX lacks: {error}. {_WAY_OUT}") from error


_ROADS: dict[str, tuple[_Writer, _Reader]] = {
    ".onnx": (_write_onnx, in_onnxruntime),
    ".pt2": (lambda program, _levels, path: save_pt2(program, path), lambda path: open_pt2(path)[1]),
    ".xml": (_write_openvino, in_openvino),
}


def _nearest(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> Tensor:
    """For each box of torch's, the index of the file's nearest box: boxes with equal scores may come in any order."""
    # 1e5 keeps labels further apart than any image is wide; the score tells boxes without an area from each other
    rows = [(x["boxes"], 1e3 * x["scores"][:, None], 1e5 * x["labels"][:, None]) for x in (wanted, got)]
    places = [torch.cat(columns, 1).double() for columns in rows]
    distances: Tensor = (places[0][:, None] - places[1]).abs().sum(2)
    return distances.argmin(1) if distances.numel() else wanted["labels"]


@dataclass(frozen=True, kw_only=True)
class DetectionCard:
    """What an exported file says about its detector. In the file, the description's fields are fields of the card.

    Args:
        description: classes, scale of an image, mean and std.
        size: height and width of the images that the file takes, pixels.
        task: what the network does.
        input: what the network takes, in words.
        output: what the network returns, in words.
        licence: licence of the weights, or "unknown".
        made_by: this package and its version.

    Raises:
        ValueError: a value is one that no network has, or beyond `replknet.limits`.
    """

    description: DetectionDescription
    size: tuple[int, int]
    task: str = "detection"
    input: str = "image: float32 [3,H,W] of the size, RGB, (value / 255 - mean) / std, 0 beside a smaller image"
    output: str = "boxes [n,4] (x1, y1, x2, y2) in pixels, labels [n], scores [n], perhaps masks [n,H,W]"
    licence: str = "unknown"
    made_by: str = ""

    def __post_init__(self) -> None:
        check_sides((min(self.size), max(self.size)))


class ExportedDetector(nn.Module):
    """A detector in a file, run by the file's own runtime.

    Args:
        run: runs the file; from `replknet.deploy.files.card_in`.
        size: height and width of the images that the file takes, pixels.
        classes: number of classes.
        masks: whether the file returns masks.

    Input: images `[3,H,W]` of any size, float32, normalised, on the CPU. A larger image is shrunk to fit, a smaller one
        is padded with 0.
    Output: for each image the objects that the detector finds, in pixels of the image.

    Raises:
        ExportedError: the file returns something else.
    """

    def __init__(self, run: Run, size: tuple[int, int], classes: int, masks: bool) -> None:
        super().__init__()
        self._run, self.size, self._classes, self._masks = run, size, classes, masks

    def forward(self, images: Sequence[Tensor]) -> list[Targets]:
        return [self._one(image) for image in images]

    def _one(self, image: Tensor) -> Targets:
        given = (image.shape[1], image.shape[2])
        factor = min(1.0, self.size[0] / given[0], self.size[1] / given[1])
        inside = tuple(max(1, int(side * factor)) for side in given)
        if inside != given:
            image = F.interpolate(image[None], inside, mode="bilinear", align_corners=False)[0]
        padded = F.pad(image, (0, self.size[1] - inside[1], 0, self.size[0] - inside[0]))
        found = self._found(padded)
        # boxes end at the image, not in its padding
        limits = found["boxes"].new_tensor([inside[1], inside[0], inside[1], inside[0]])
        found["boxes"] = found["boxes"].clamp(min=0).minimum(limits)
        keep = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)
        found = {name: value[keep] for name, value in found.items()}
        if "masks" in found:
            found["masks"] = found["masks"][:, : inside[0], : inside[1]]
        return rescaled(found, (inside[0], inside[1]), given)

    def _found(self, padded: Tensor) -> Targets:
        outputs = self._run(padded)
        # as many labels and scores as there are boxes
        n = len(outputs[0]) if outputs and outputs[0].ndim else None
        wanted: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
            "boxes": (torch.float32, (n, 4)),
            "labels": (torch.int64, (n,)),
            "scores": (torch.float32, (n,)),
            "masks": (torch.float32, (n, *self.size)),
        }
        if not self._masks:
            del wanted["masks"]
        check_outputs(outputs, wanted)
        found = dict(zip(wanted, outputs, strict=True))
        if n and not 0 <= int(found["labels"].min()) <= int(found["labels"].max()) < self._classes:
            raise ExportedError(
                f"the exported file finds objects of class {int(found['labels'].max())}, and it has {self._classes} "
                "classes; export it again with `replknet export`"
            )
        return found


def _write(network: Network, path: Path, to: Format, examples: Sequence[Image.Image], licence: str) -> Difference:
    d = network.description
    fit = ForEvaluation(d.scale, d.normalize)
    prepared = [batched([fit(pixels(image), {})[0]])[0][0] for image in examples]
    with torch.inference_mode():
        # the file takes images of one size: the size of the first image with an object
        example = next((x for x in prepared if len(network.model([x])[0]["boxes"])), None)
    if example is None:
        raise ValueError(
            f"the detector finds nothing in the {len(prepared)} images for the check: name an image with objects with "
            "--images. The file will take images of its size"
        )
    card = DetectionCard(
        description=d,
        size=(example.shape[1], example.shape[2]),
        licence=licence,
        made_by=f"replknet {version('replknet')}",
    )
    return export_detector(network.model, path, example, plain_card(card))


def _open(path: Path, card: dict[str, Any], run: Run) -> tuple[ExportedDetector, DetectionDescription]:
    found = described_card(DetectionCard, DetectionDescription, card, path)
    d = found.description
    return ExportedDetector(run, found.size, len(d.classes), d.masks), d


EXPORT = Export(
    write=_write,
    open=_open,
    compared="boxes, labels and scores of an image, of its mirror image and of an empty one",
    bound=BOUNDS["boxes"],
)
