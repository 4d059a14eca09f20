"""Exported files of all tasks: formats, how to write, check and run a file, and the card in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from replknet.deploy.cards import KEY, LARGEST_SIDE, ExportedError, card_of_text, found_in
from replknet.deploy.onnx_graphs import open_onnx
from replknet.deploy.openvino_graphs import open_openvino
from replknet.deploy.programs import open_aoti, open_pt2, save_pt2, trusted
from replknet.deploy.verify import Difference, Run, compared, kept, worst
from replknet.reading import Kind, reading
from replknet.shown import shown

Format = Literal["onnx", "openvino", "pt2", "aoti"]
# endings of the files; .aoti.pt2 holds a library for this machine, .pt2 a graph
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "aoti": ".aoti.pt2"}
# largest relative L2 difference of the logits from torch's
BOUND = 1e-5
# formats whose files are programs: reading one runs code
PROGRAMS: tuple[Format, ...] = ("pt2", "aoti")

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


def card_in(path: Path, trust: bool = False) -> tuple[dict[str, Any], Run]:
    """The card of a file, and a function that runs the file in its own runtime.

    Args:
        path: a file of `write_checked`.
        trust: whether to run the code in a file of `PROGRAMS`.

    Raises:
        FileNotFoundError: there is no such file.
        ExportedError: the file is damaged, has no card of replknet's, or is a program that is not trusted.
        ValueError: the file's ending is not one of `ENDINGS`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no exported network at {shown(path)}")
    to = format_of(path)
    if to in PROGRAMS:
        trusted(path, trust)
    text, run = _READERS[to](path)
    card = card_of_text(text, path)
    smallest, largest = card.get("sides", sides_of(0))

    def run_checked(x: Tensor) -> Sequence[Tensor]:
        # with other sizes, some runtimes raise an error of their own, and some return wrong numbers
        if not all(smallest <= side <= largest for side in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"{shown(path)} takes images with sides from {smallest} to {largest} pixels, got {size}")
        # a damaged program may be read, and fail only here
        with reading(path, _RUN):
            return run(x)

    return card, run_checked


def add_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a card into an ONNX file."""
    import onnx

    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(card)
    onnx.save(model, path)


class Exported(nn.Module):
    """A network with one output in a file, run by the file's own runtime.

    Args:
        run: runs the file; from `card_in`.
        shape: the output's shape for images of a shape; None: it is not checked.

    Input: `[N,3,H,W]`, float32, on the CPU.
    Output: the file's first output.

    Raises:
        ValueError: a side of the images is outside of the card's range.
        ExportedError: the output has another shape or dtype, or numbers that are not finite.
    """

    def __init__(self, run: Run, shape: Callable[[torch.Size], tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self._run, self._shape = run, shape

    def forward(self, x: Tensor) -> Tensor:
        found = self._run(x)
        if self._shape is not None:
            check_outputs(found, {"logits": (torch.float32, self._shape(x.shape))})
        return found[0]


def check_outputs(found: Sequence[Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> None:
    """Refuse what a foreign or damaged file returns.

    Args:
        found: outputs of a file.
        wanted: name -> dtype and shape of each output; None: any length.

    Raises:
        ExportedError: another number of outputs, another shape or dtype, or numbers that are not finite.
    """
    if len(found) != len(wanted):
        raise ExportedError(f"the exported file returns {len(found)} tensors, expected {', '.join(wanted)}; {_AGAIN}")
    for output, (name, (dtype, shape)) in zip(found, wanted.items(), strict=True):
        same = len(output.shape) == len(shape) and all(
            side in (None, length) for side, length in zip(shape, output.shape, strict=True)
        )
        if output.dtype != dtype or not same:
            told = ["any" if side is None else side for side in shape]
            raise ExportedError(
                f"the exported file returns {name} as {list(output.shape)} in {output.dtype}, expected "
                f"[{', '.join(map(str, told))}] in {dtype}; {_AGAIN}"
            )
        if output.is_floating_point() and not output.isfinite().all():
            raise ExportedError(f"the exported file returns {name} that are not finite numbers; {_AGAIN}")


_RUN = Kind(ExportedError, "a network that computes images", "export it again")
_AGAIN = "export it again with `replknet export`"


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
    exported.model.metadata_props[KEY] = card
    exported.save(path)


def _write_openvino(program: _Program, card: str, path: Path) -> None:
    import openvino

    converted = openvino.convert_model(program)
    # else the names of torch's graph remain
    converted.inputs[0].tensor.set_names({"image"})
    converted.outputs[0].tensor.set_names({"logits"})
    converted.set_rt_info(card, KEY)
    # else the weights are rounded to float16
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_aoti(program: _Program, card: str, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {KEY: card}}
    )


def _open_pt2(path: Path) -> tuple[str, Run]:
    text, run = open_pt2(path)
    # a network with one output returns a tensor, not a tuple
    return found_in(text, path), lambda x: [run(x)]


_WRITERS: dict[Format, Callable[[_Program, str, Path], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": lambda program, card, path: save_pt2(program, path, card),
    "aoti": _write_aoti,
}
# format -> a function that returns the text of the card and a function that runs the file
_READERS: dict[Format, Callable[[Path], tuple[str, Run]]] = {
    "onnx": open_onnx,
    "openvino": open_openvino,
    "pt2": _open_pt2,
    "aoti": open_aoti,
}
