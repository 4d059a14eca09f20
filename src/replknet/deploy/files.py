"""What the files of all tasks share: formats, how each is written, checked and run, and the card that stands in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from replknet.deploy.verify import Difference, Run, compared, in_onnxruntime, in_openvino, kept, worst
from replknet.models.model_files import as_tuples

Card = TypeVar("Card")
Format = Literal["onnx", "openvino", "pt2", "aoti"]
# endings of the files; that of aoti, a library for this machine in torch's archive, tells it from a graph
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".aoti.pt2"}
# relative L2 difference of the logits from torch's that is allowed
BOUND = 1e-5
# of an image that a file takes, pixels
LARGEST_SIDE = 8192

_KEY = "replknet"
_Program = torch.export.ExportedProgram


def write_checked(
    network: nn.Module, stride: int, card: Mapping[str, Any], path: Path, to: Format, examples: Sequence[Tensor]
) -> Difference:
    """Write a network with one input, `image`, and one output, `logits`, and keep the file if it computes the same.

    Args:
        network: merged, in eval mode, in float32 on the CPU.
        stride: of its last map; sides of images are longer.
        card: what else the file holds, as JSON can.
        path: ends as `ENDINGS` says.
        to: the format.
        examples: prepared images `[N,3,H,W]` on which it is checked, beside random ones of two other sizes.

    Raises:
        ValueError: another ending, or examples of another shape or dtype.
        RuntimeError: the file differs by more than `BOUND`; none is left.
    """
    if not path.name.endswith(ENDINGS[to]) or (to == "pt2" and path.name.endswith(ENDINGS["aoti"])):
        raise ValueError(f"a file for {to} ends in {ENDINGS[to]}, got {path.name}")
    for x in examples:
        if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.float32 or min(x.shape[2:]) <= stride:
            raise ValueError(
                f"expected examples [N,3,H,W] in float32 with sides of more than {stride} pixels, got {list(x.shape)} "
                f"in {x.dtype}"
            )
    generator = torch.Generator().manual_seed(0)
    random = [
        torch.randn(n, 3, *sides, generator=generator)
        for n, sides in ((1, (2 * stride, 2 * stride)), (3, (5 * stride, 4 * stride - 1)))
    ]
    found = []
    with torch.no_grad(), kept(path) as part:
        text = json.dumps(card)
        _WRITERS[to](_program(network, stride), text, part)
        read, run = _READERS[to](part)
        assert read == text
        for x in (*examples, *random):
            found.append(compared("the logits", network(x.cpu()), run(x.cpu())[0], BOUND))
    return worst(found)


def sides_of(stride: int) -> tuple[int, int]:
    """The smallest and the largest side of an image that a file takes, pixels.

    Args:
        stride: of the network's last map.
    """
    # torch refuses a range in which the last map has a side of one
    return stride + 1, LARGEST_SIDE


def _program(network: nn.Module, stride: int) -> _Program:
    """The graph for any batch and size."""
    smallest, largest = sides_of(stride)
    sides = {i: torch.export.Dim(name, min=smallest, max=largest) for i, name in ((2, "height"), (3, "width"))}
    shapes = {0: torch.export.Dim("batch", max=65536), **sides}
    return torch.export.export(network, (torch.zeros(2, 3, 3 * stride, 4 * stride),), dynamic_shapes=(shapes,))


def card_in(path: Path) -> tuple[dict[str, Any], Run]:
    """The card of a file, lists as tuples, and its network in the file's own runtime.

    Args:
        path: a file of `write_checked`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending is not one of `ENDINGS`, or it has no card of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no exported network at {path}")
    text, run = _READERS[format_of(path)](path)
    if text is None:
        raise ValueError(
            f"{path} says nothing of its classes and images: it was not written by `replknet export`, which does"
        )
    card: dict[str, Any] = {key: as_tuples(value) for key, value in json.loads(text).items()}
    smallest, largest = card.get("sides", sides_of(0))

    def run_checked(x: Tensor) -> Sequence[Tensor]:
        # what runtimes do with other sizes differs: an error of their own, or anything
        if not all(smallest <= side <= largest for side in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"{path} takes images with sides from {smallest} to {largest} pixels, got {size}")
        return run(x)

    return card, run_checked


def parsed_card(kind: type[Card], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file as a task's own record.

    Raises:
        ValueError: it has other fields.
    """
    try:
        return kind(**card)
    except TypeError as error:
        raise ValueError(f"{path} has a card that this version cannot read: {error}") from error


def described_card(kind: type[Card], description: type[Any], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file whose fields stand beside those of a description; see `parsed_card`."""
    theirs = {field.name for field in fields(description)}
    inner = parsed_card(description, {name: value for name, value in card.items() if name in theirs}, path)
    outer = {name: value for name, value in card.items() if name not in theirs}
    return parsed_card(kind, {"description": inner, **outer}, path)


def plain_card(card: Any) -> dict[str, Any]:
    """A card with a description as it stands in a file, in one object."""
    values = asdict(card)
    return {**values.pop("description"), **values}


def add_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a card into an ONNX file."""
    import onnx

    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = _KEY, json.dumps(card)
    onnx.save(model, path)


class Exported(nn.Module):
    """A network with one output in a file, run by the file's own runtime.

    Args:
        run: from `card_in`.

    Input: `[N,3,H,W]`, float32, on the CPU.
    Output: the file's first output; an image whose sides are not those of the card is a ValueError.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]


def format_of(path: Path) -> Format:
    """The format of a file, by its ending.

    Raises:
        ValueError: it is none of `ENDINGS`.
    """
    # the longest first: `.aoti.pt2` also ends in `.pt2`
    for to, ending in sorted(ENDINGS.items(), key=lambda item: -len(item[1])):
        if path.name.endswith(ending):
            return to
    raise ValueError(f"an exported network ends in {', '.join(ENDINGS.values())}, got {path.name}")


def is_exported(path: str | Path) -> bool:
    """Whether a path has the ending of an exported network."""
    return str(path).endswith(tuple(ENDINGS.values()))


# ---- formats


def _write_onnx(program: _Program, card: str, path: Path) -> None:
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"])
    assert exported is not None
    exported.model.metadata_props[_KEY] = card
    exported.save(path)


def _write_openvino(program: _Program, card: str, path: Path) -> None:
    import openvino

    converted = openvino.convert_model(program)
    # else the names of torch's graph remain
    converted.inputs[0].tensor.set_names({"image"})
    converted.outputs[0].tensor.set_names({"logits"})
    converted.set_rt_info(card, _KEY)
    # otherwise the weights are rounded to float16
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_pt2(program: _Program, card: str, path: Path) -> None:
    torch.export.save(program, path, extra_files={_KEY: card})


def _write_aoti(program: _Program, card: str, path: Path) -> None:
    # torch wants an ending of its own
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {_KEY: card}}
    )


def _open_onnx(path: Path) -> tuple[str | None, Run]:
    import onnx

    # the weights are not read
    properties = onnx.load(path, load_external_data=False).metadata_props
    return next((entry.value for entry in properties if entry.key == _KEY), None), in_onnxruntime(path)


def _open_openvino(path: Path) -> tuple[str | None, Run]:
    import openvino

    model = openvino.Core().read_model(path)
    return str(model.get_rt_info(_KEY).value) if model.has_rt_info(_KEY) else None, in_openvino(path)


def _open_pt2(path: Path) -> tuple[str | None, Run]:
    files = {_KEY: ""}
    run = torch.export.load(path, extra_files=files).module()
    # of one output it gives the output
    return files[_KEY] or None, lambda x: [run(x)]


def _open_aoti(path: Path) -> tuple[str | None, Run]:
    run = torch._inductor.aoti_load_package(str(path))
    # it does not look at strides
    return run.get_metadata().get(_KEY), lambda x: [run(x.contiguous())]


_WRITERS: dict[Format, Callable[[_Program, str, Path], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
}
# the card, None where there is none of ours, and the network in the file's runtime
_READERS: dict[Format, Callable[[Path], tuple[str | None, Run]]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "pt2": _open_pt2,
    "aoti": _open_aoti,
}
