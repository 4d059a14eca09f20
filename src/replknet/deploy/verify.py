"""The check of exported files: each runs in its own runtime, and is kept only if it computes what torch computes."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from replknet.difference import largest_difference
from replknet.shown import shown

Run = Callable[[Tensor], Sequence[Tensor]]


class AccuracyError(RuntimeError):
    """A form of a network computes something else than its source, or int8 loses more accuracy than is allowed.

    No file was written.
    """


@dataclass(frozen=True)
class Difference:
    """The difference between a file's outputs and torch's.

    Args:
        absolute: largest difference of a single number; for boxes in pixels.
        relative: L2 norm of the difference divided by the L2 norm of torch's output.
    """

    absolute: float
    relative: float


def worst(found: Sequence[Difference]) -> Difference:
    """The largest absolute and the largest relative difference."""
    return Difference(max(d.absolute for d in found), max(d.relative for d in found))


def in_onnxruntime(path: Path) -> Run:
    """Runs an .onnx file with one input `image` on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # no warnings: shapes that torch's older exporter guessed cause many
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {"image": x.numpy()})]


def in_openvino(path: Path) -> Run:
    """Runs an .xml file of OpenVINO on the CPU in float32."""
    import openvino

    # else OpenVINO computes in bfloat16 on a processor that has it
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


def compared(name: str, wanted: Tensor, got: Tensor, bound: float) -> Difference:
    """The difference between an output of a file and torch's.

    Args:
        name: what the error calls the output.
        wanted: torch's output.
        got: the file's output.
        bound: largest relative L2 difference that is allowed.

    Raises:
        AccuracyError: the output differs more, or has another shape.
    """
    problem = f"expected {name} {list(wanted.shape)}, got {list(got.shape)}"
    if got.shape == wanted.shape:
        if torch.equal(wanted, got):
            return Difference(0.0, 0.0)
        found = Difference(*largest_difference(wanted, got))
        if found.relative <= bound:
            return found
        problem = f"{name} may differ by {bound:.0e} of the norm, got {found.relative:.1e}"
    raise AccuracyError(
        f"the exported file does not compute what torch computes, so it was not kept: {problem}; if the difference is "
        "close to the bound, try another example"
    )


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """A temporary path for a file and the files beside it. If nothing is raised, they move to the folder of `path`.

    Raises:
        ValueError: `path` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{shown(path)} is a folder: name the file to write, such as {shown(path)}/net{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch and OpenVINO write to no other path
    plain = _is_utf8(path)
    with TemporaryDirectory(dir=path.parent if plain else None, prefix=".export-") as folder:
        part = Path(folder) / (path.name if plain else f"net{path.suffix}")
        yield part
        # sorted: OpenVINO's weights, .bin, move before their .xml
        for file in sorted(Path(folder).iterdir()):
            # the second also moves to another disk
            move = os.replace if plain else shutil.move
            move(file, path.parent / f"{path.stem}{file.name.removeprefix(part.stem)}")


def _is_utf8(path: Path) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
