"""Classifiers as files for other runtimes, with everything in them that is needed to use them.

A file is the merged network in float32 for any batch and any height and width from its last stride on. Its depthwise
convolutions are standard ones, so it runs the runtime's own. No file is kept that does not compute what torch does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from replknet.deploy.checked import Difference, Run, compared, in_onnxruntime, in_openvino, in_torch, kept, worst
from replknet.models import Description
from replknet.models.staged import StagedNet
from replknet.nn import merge

Format = Literal["onnx", "openvino", "pt2", "aoti"]
# endings of the files; that of aoti, a library for this machine in torch's archive, tells it from a graph
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".aoti.pt2"}
# relative L2 difference of the logits from torch's that is allowed
BOUND = 1e-5

_KEY = "replknet"


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
    path = Path(path)
    if not path.name.endswith(ENDINGS[to]) or (to == "pt2" and path.name.endswith(ENDINGS["aoti"])):
        raise ValueError(f"a file for {to} ends in {ENDINGS[to]}, got {path.name}")
    stride = int(model.feature_info[-1]["reduction"])
    for x in examples:
        if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.float32 or min(x.shape[2:]) <= stride:
            raise ValueError(
                f"expected examples [N,3,H,W] in float32 with sides of more than {stride} pixels, got {list(x.shape)} "
                f"in {x.dtype}"
            )
    network = merge(model).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    random = [
        torch.randn(n, 3, *sides, generator=generator)
        for n, sides in ((1, (2 * stride, 2 * stride)), (3, (5 * stride, 4 * stride - 1)))
    ]
    found = []
    with torch.no_grad(), kept(path) as part:
        program = _program(network, stride)
        _WRITERS[to](program, json.dumps(asdict(card)), part)
        run = _RUNTIMES[to](part)
        for x in (*examples, *random):
            found.append(compared("the logits", network(x.cpu()), run(x.cpu())[0], BOUND))
    return worst(found)


def _program(network: nn.Module, stride: int) -> torch.export.ExportedProgram:
    """The graph for any batch and size; torch refuses a range in which the last map has a side of one."""
    sides = {i: torch.export.Dim(name, min=stride + 1, max=8192) for i, name in ((2, "height"), (3, "width"))}
    shapes = {0: torch.export.Dim("batch", max=65536), **sides}
    return torch.export.export(network, (torch.zeros(2, 3, 3 * stride, 4 * stride),), dynamic_shapes=(shapes,))


class Exported(nn.Module):
    """A classifier in a file, run by the file's own runtime.

    Args:
        path: a file of `export_classifier`.

    Input: `[N,3,H,W]`, float32, on the CPU.
    Output: logits `[N,classes]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending is not one of `ENDINGS`, or it has no card of ours.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no exported network at {path}")
        self.card = _card(path)
        self._run = _RUNTIMES[format_of(path)](path)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x.contiguous())[0]


def format_of(path: Path) -> Format:
    """The format of a file, by its ending.

    Raises:
        ValueError: it is none of `ENDINGS`.
    """
    # the longest first: that of aoti ends as that of pt2
    for to, ending in sorted(ENDINGS.items(), key=lambda item: -len(item[1])):
        if path.name.endswith(ending):
            return to
    raise ValueError(f"an exported network ends in {', '.join(ENDINGS.values())}, got {path.name}")


def is_exported(path: str | Path) -> bool:
    """Whether a path has the ending of an exported network."""
    return str(path).endswith(tuple(ENDINGS.values()))


def _card(path: Path) -> Card:
    text = _CARDS[format_of(path)](path)
    if text is None:
        raise ValueError(
            f"{path} says nothing of its classes and images: it was not written by `replknet export`, which does"
        )
    fields: dict[str, Any] = json.loads(text)
    for key in ("classes", "mean", "std"):
        fields[key] = tuple(fields[key])
    return Card(**fields)


# ---- formats


def _write_onnx(program: torch.export.ExportedProgram, card: str, path: Path) -> None:
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"])
    assert exported is not None
    exported.model.metadata_props[_KEY] = card
    exported.save(path)


def _write_openvino(program: torch.export.ExportedProgram, card: str, path: Path) -> None:
    import openvino

    converted = openvino.convert_model(program)
    converted.set_rt_info(card, _KEY)
    # otherwise the weights are rounded to float16
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_pt2(program: torch.export.ExportedProgram, card: str, path: Path) -> None:
    torch.export.save(program, path, extra_files={_KEY: card})


def _write_aoti(program: torch.export.ExportedProgram, card: str, path: Path) -> None:
    # torch wants an ending of its own
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {_KEY: card}}
    )


def _in_pt2(path: Path) -> Run:
    run = in_torch(path)
    return lambda x: [run(x)]  # type: ignore[list-item]  # of one output it gives the output


def _in_aoti(path: Path) -> Run:
    run = torch._inductor.aoti_load_package(str(path))
    return lambda x: [run(x)]


def _onnx_card(path: Path) -> str | None:
    import onnx

    # the weights are not read
    model = onnx.load(path, load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == _KEY), None)


def _openvino_card(path: Path) -> str | None:
    import openvino

    model = openvino.Core().read_model(path)
    return str(model.get_rt_info(_KEY).value) if model.has_rt_info(_KEY) else None


def _pt2_card(path: Path) -> str | None:
    files = {_KEY: ""}
    torch.export.load(path, extra_files=files)
    return files[_KEY] or None


def _aoti_card(path: Path) -> str | None:
    card: str | None = torch._inductor.aoti_load_package(str(path)).get_metadata().get(_KEY)
    return card


_WRITERS: dict[Format, Callable[[torch.export.ExportedProgram, str, Path], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
}
_RUNTIMES: dict[Format, Callable[[Path], Run]] = {
    "onnx": in_onnxruntime,
    "openvino": in_openvino,
    "pt2": _in_pt2,
    "aoti": _in_aoti,
}
_CARDS: dict[Format, Callable[[Path], str | None]] = {
    "onnx": _onnx_card,
    "openvino": _openvino_card,
    "pt2": _pt2_card,
    "aoti": _aoti_card,
}
