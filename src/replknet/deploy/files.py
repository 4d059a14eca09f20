"""Exported files of all tasks: formats, how to write, check and run a file, and the card in it."""

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
# endings of the files; .aoti.pt2 holds a library for this machine, .pt2 a graph
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".aoti.pt2"}
# largest relative L2 difference of the logits from torch's
BOUND = 1e-5
# largest side of an image that a file takes, pixels
LARGEST_SIDE = 8192

_KEY = "replknet"
_Program = torch.export.ExportedProgram


def write_checked(
    network: nn.Module, stride: int, card: Mapping[str, Any], path: Path, to: Format, examples: Sequence[Tensor]
) -> Difference:
    """Write a network with one input, `image`, and one output, `logits`. Keep the file if it computes what torch does.

    Args:
        network: the merged network, in eval mode, in float32 on the CPU.
        stride: stride of its last map; the sides of images are larger.
        card: the card for the file, ready for JSON.
        path: ends as `ENDINGS` says.
        to: the format.
        examples: prepared images `[N,3,H,W]` for the check. Random images of two other sizes are checked, too.

    Returns:
        The largest difference from torch, in the file's runtime on the CPU.

    Raises:
        ValueError: the path has another ending, or an example another shape or dtype.
        RuntimeError: the file differs by more than `BOUND`; it is removed.
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
        stride: stride of the network's last map.
    """
    # torch refuses a range in which the last map has a side of one
    return stride + 1, LARGEST_SIDE


def _program(network: nn.Module, stride: int) -> _Program:
    """The graph of the network, for any batch size and any size of the images."""
    smallest, largest = sides_of(stride)
    sides = {i: torch.export.Dim(name, min=smallest, max=largest) for i, name in ((2, "height"), (3, "width"))}
    shapes = {0: torch.export.Dim("batch", max=65536), **sides}
    return torch.export.export(network, (torch.zeros(2, 3, 3 * stride, 4 * stride),), dynamic_shapes=(shapes,))


def card_in(path: Path) -> tuple[dict[str, Any], Run]:
    """The card of a file, with lists as tuples, and a function that runs the file in its own runtime.

    Args:
        path: a file of `write_checked`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's ending is not one of `ENDINGS`, or the file has no card of replknet's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no exported network at {path}")
    text, run = _READERS[format_of(path)](path)
    if text is None:
        raise ValueError(
            f"{path} says nothing about its classes and images: expected a file that `replknet export` wrote"
        )
    card: dict[str, Any] = {key: as_tuples(value) for key, value in json.loads(text).items()}
    smallest, largest = card.get("sides", sides_of(0))

    def run_checked(x: Tensor) -> Sequence[Tensor]:
        # with other sizes, some runtimes raise an error of their own, and some return wrong numbers
        if not all(smallest <= side <= largest for side in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"{path} takes images with sides from {smallest} to {largest} pixels, got {size}")
        return run(x)

    return card, run_checked


def parsed_card(kind: type[Card], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file as a task's own record.

    Raises:
        ValueError: the card has other fields.
    """
    try:
        return kind(**card)
    except TypeError as error:
        raise ValueError(f"{path} has a card that this version cannot read: {error}") from error


def described_card(kind: type[Card], description: type[Any], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file that also has the fields of a description; see `plain_card` and `parsed_card`."""
    theirs = {field.name for field in fields(description)}
    inner = parsed_card(description, {name: value for name, value in card.items() if name in theirs}, path)
    outer = {name: value for name, value in card.items() if name not in theirs}
    return parsed_card(kind, {"description": inner, **outer}, path)


def plain_card(card: Any) -> dict[str, Any]:
    """A card with a description as one object for a file: the description's fields become fields of the card."""
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
        run: runs the file; from `card_in`.

    Input: `[N,3,H,W]`, float32, on the CPU.
    Output: the file's first output.

    Raises:
        ValueError: a side of the images is outside of the card's range.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]


def format_of(path: Path) -> Format:
    """The format of a file, by its ending.

    Raises:
        ValueError: the ending is none of `ENDINGS`.
    """
    # the longest first: `.aoti.pt2` also ends in `.pt2`
    for to, ending in sorted(ENDINGS.items(), key=lambda item: -len(item[1])):
        if path.name.endswith(ending):
            return to
    raise ValueError(f"an exported network ends in {', '.join(ENDINGS.values())}, got {path.name}")


def is_exported(path: str | Path) -> bool:
    """Whether a path has the ending of an exported network."""
    return str(path).endswith(tuple(ENDINGS.values()))


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
    # else the weights are rounded to float16
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_pt2(program: _Program, card: str, path: Path) -> None:
    torch.export.save(program, path, extra_files={_KEY: card})


def _write_aoti(program: _Program, card: str, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {_KEY: card}}
    )


def _open_onnx(path: Path) -> tuple[str | None, Run]:
    import onnx

    # the card is in the graph, so weights in other files need not be read
    properties = onnx.load(path, load_external_data=False).metadata_props
    return next((entry.value for entry in properties if entry.key == _KEY), None), in_onnxruntime(path)


def _open_openvino(path: Path) -> tuple[str | None, Run]:
    import openvino

    model = openvino.Core().read_model(path)
    return str(model.get_rt_info(_KEY).value) if model.has_rt_info(_KEY) else None, in_openvino(path)


def _open_pt2(path: Path) -> tuple[str | None, Run]:
    files = {_KEY: ""}
    run = torch.export.load(path, extra_files=files).module()
    # a network with one output returns a tensor, not a tuple
    return files[_KEY] or None, lambda x: [run(x)]


def _open_aoti(path: Path) -> tuple[str | None, Run]:
    run = torch._inductor.aoti_load_package(str(path))
    # the library assumes contiguous images and does not check
    return run.get_metadata().get(_KEY), lambda x: [run(x.contiguous())]


_WRITERS: dict[Format, Callable[[_Program, str, Path], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "aoti": _write_aoti,
}
# format -> a function that returns the text of the card, or None, and a function that runs the file
_READERS: dict[Format, Callable[[Path], tuple[str | None, Run]]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "pt2": _open_pt2,
    "aoti": _open_aoti,
}
