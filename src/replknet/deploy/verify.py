"""Files for other runtimes: run there, compared with torch, and kept only if they compute the same."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from replknet.difference import largest_difference

Run = Callable[[Tensor], Sequence[Tensor]]


class AccuracyError(RuntimeError):
    """int8 costs more accuracy than is allowed, whichever layers stay in float32; no file was written."""


@dataclass(frozen=True)
class Difference:
    """How far a file's outputs are from torch's: the largest of all outputs and of all images it was checked on.

    Args:
        absolute: of one number; that of a box is in pixels.
        relative: L2 norm of an output's difference, by that of torch's output.
    """

    absolute: float
    relative: float


def worst(found: Sequence[Difference]) -> Difference:
    """The largest of each kind."""
    return Difference(max(d.absolute for d in found), max(d.relative for d in found))


def in_onnxruntime(path: Path) -> Run:
    """An .onnx file with one input `image`, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # it warns of the shapes that the older exporter guessed
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {"image": x.numpy()})]


def in_torch(path: Path) -> Run:
    """A .pt2 file of torch.export."""
    return torch.export.load(path).module()


def in_openvino(path: Path) -> Run:
    """An .xml file of OpenVINO, on the CPU in float32."""
    import openvino

    # on a processor with bfloat16 OpenVINO would compute in that
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


def compared(name: str, wanted: Tensor, got: Tensor, bound: float) -> Difference:
    """How far an output of a file is from torch's.

    Args:
        name: of the output, for the error.
        wanted: torch's.
        got: the file's.
        bound: largest relative L2 difference.

    Raises:
        RuntimeError: it differs more, or has another shape.
    """
    problem = f"expected {name} {list(wanted.shape)}, got {list(got.shape)}"
    if got.shape == wanted.shape:
        if torch.equal(wanted, got):
            return Difference(0.0, 0.0)
        found = Difference(*largest_difference(wanted, got))
        if found.relative <= bound:
            return found
        problem = f"{name} may differ by {bound:.0e} of the norm, got {found.relative:.1e}"
    raise RuntimeError(
        f"the exported file is not torch's network, so it was not kept: {problem}; if that is a close call, another "
        "example may do"
    )


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Where to write a file and those beside it, which get their place if nothing is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        # the weights of OpenVINO, .bin, come before their .xml
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, path.parent / file.name)
