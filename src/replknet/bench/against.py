"""One network in our inference form, in torch and in other runtimes: times, differences, memory.

All ways compute the same outputs from the same images, with one number of threads. They are timed in turns in one
process. The torch ways run the merged network on torch's own convolution. The other runtimes read an ONNX file of the
merged network with the shape of the images fixed, which is their best case.

Peak memory is measured in a separate process for each way, which runs
`python -m replknet.bench.against NETWORK WAY DTYPE THREADS ONNX KEEP`.
"""

import ctypes
import gc
import importlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replknet.bench.records import ProcessError, provenance
from replknet.deploy.inference import BOUNDS, optimize
from replknet.deploy.verify import AccuracyError
from replknet.difference import largest_difference
from replknet.kernels import use_backend
from replknet.kernels.malloc import keep_freed_memory
from replknet.nn import merge
from replknet.timing import Load, Timing, interleaved

OURS = "replknet"
# what our form can be compared with: name -> its ways
AGAINST = {
    "merged": ("merged",),
    "torch": ("torch channels_last", "torch contiguous"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
}
_FORMATS = {"torch contiguous": torch.contiguous_format}
# ways with their own threads
_APART = ("onnxruntime", "openvino")
_IN_ONNX = _APART

Way = Callable[[], Any]


@dataclass(frozen=True)
class Memory:
    """Memory of a separate process, bytes, without what Python and the libraries held before the network was loaded.

    Args:
        held: memory before the first run: the weights as this way keeps them.
        peak: peak of memory during two runs.
    """

    held: int
    peak: int


@dataclass(frozen=True)
class Row:
    """One way of running the network.

    Args:
        way: name of the way.
        timing: time of a call with all images.
        ratio: median time divided by the median time of our inference form.
        difference: largest relative L2 difference between an output and the merged network's output in float32.
        memory: memory of the way; None if it was not asked for, or if the system does not report it.
    """

    way: str
    timing: Timing
    ratio: float
    difference: float
    memory: Memory | None


@dataclass(frozen=True)
class Comparison:
    """All ways of one network, and where they were measured; `asdict` gives JSON."""

    network: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[Row, ...]
    load: dict[str, float | None]
    provenance: dict[str, Any]


def compare(
    name: str,
    model: nn.Module,
    x: Tensor,
    against: Sequence[str] = tuple(AGAINST),
    *,
    dtype: torch.dtype = torch.float32,
    runs: int = 10,
    limit_s: float = 60.0,
    memory: bool = False,
    keep_memory: bool = False,
) -> Comparison:
    """Time our inference form and other ways.

    Args:
        name: name of the network, for the record.
        model: a classifier, a backbone with features, or a segmentation network, in float32 on the CPU.
        x: images `[N,3,H,W]`.
        against: names in `AGAINST`.
        dtype: dtype of all ways: torch.float32, or torch.bfloat16, which onnxruntime does not have.
        runs: rounds, at least 2.
        limit_s: a way that has taken this many seconds sits out after three rounds.
        memory: also measure the memory of each way.
        keep_memory: keep freed memory in the process, as `optimize` may. This helps every way that allocates through
            the C library.

    Returns:
        One row a way, ours first.

    Raises:
        ValueError: a name or the dtype is unknown.
        AccuracyError: outputs differ by more than `BOUNDS` of their norm; nothing is timed.
    """
    ways = [OURS]
    for other in against:
        if other not in AGAINST:
            raise ValueError(f"a network is compared with {', '.join(AGAINST)}, got {other!r}")
        ways += AGAINST[other]
    _check_dtype(dtype, ways)
    if keep_memory:
        keep_freed_memory()
    merged = merge(model).eval().requires_grad_(False)
    with torch.inference_mode():
        wanted = _outputs(merged(x))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "network.onnx"
        if any(way in _IN_ONNX for way in ways):
            write_onnx(merged, x, file)
        calls = {way: _call(way, merged, x, dtype, file) for way in ways}
        differences = {way: _difference(way, wanted, call(), BOUNDS[dtype]) for way, call in calls.items()}
        load = Load()
        times = interleaved(calls, runs, limit_s, [way for way in _APART if way in calls], pause_s=0.2)
        disturbed = load.end()
        del calls
        peaks = {way: peak(merged, x, way, dtype, file, keep_memory) if memory else None for way in ways}
    ours = times[OURS].p50_ms
    rows = tuple(Row(way, times[way], round(times[way].p50_ms / ours, 3), differences[way], peaks[way]) for way in ways)
    short = str(dtype).removeprefix("torch.")
    return Comparison(name, tuple(x.shape), short, rows, disturbed, provenance())


def _check_dtype(dtype: torch.dtype, ways: Sequence[str]) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"networks are compared in torch.float32 or torch.bfloat16, got {dtype}")
    if dtype == torch.bfloat16 and "onnxruntime" in ways:
        raise ValueError("onnxruntime does not compute in bfloat16 on a CPU: compare with torch,openvino")


def write_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a merged network as ONNX, for images of one shape, with standard nodes."""
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False, input_names=["image"])
    assert exported is not None
    exported.save(path)


def _call(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    """A call of one way, ready to be timed."""
    return {
        OURS: _ours,
        "merged": _merged,
        "torch channels_last": _torch,
        "torch contiguous": _torch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }[way](way, merged, x, dtype, file)


def _ours(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    return partial(optimize(merged, x, dtype=dtype), _formatted(x, way))


def _merged(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    network = _copied(merged, way, dtype)
    return partial(network, _formatted(x, way).to(dtype))


def _torch(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    call = _merged(way, merged, x, dtype, file)

    def on_aten() -> Any:
        with use_backend("aten"):
            return call()

    return on_aten


def _onnxruntime(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {"image": x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _openvino(way: str, merged: nn.Module, x: Tensor, dtype: torch.dtype, file: Path) -> Way:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(file, "CPU", settings).create_infer_request()
    feed = {0: x.contiguous().numpy()}
    # shared inputs and outputs save copies
    return lambda: list(request.infer(feed, share_inputs=True, share_outputs=True).values())


def _copied(merged: nn.Module, way: str, dtype: torch.dtype) -> nn.Module:
    return merge(merged).to(dtype).to(memory_format=_FORMATS.get(way, torch.channels_last))


def _formatted(x: Tensor, way: str) -> Tensor:
    return x.contiguous(memory_format=_FORMATS.get(way, torch.channels_last))


def _outputs(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [torch.as_tensor(one) for one in found]


def _difference(way: str, wanted: Sequence[Tensor], found: Any, bound: float) -> float:
    got = _outputs(found)
    largest = max(largest_difference(one, other.float())[1] for one, other in zip(wanted, got, strict=True))
    if not largest <= bound:
        raise AccuracyError(
            f"{way}: outputs may differ by {bound:.0e} of their norm, got {largest:.1e}; nothing is timed"
        )
    return largest


def peak(
    merged: nn.Module, x: Tensor, way: str, dtype: torch.dtype, file: Path, keep_memory: bool = False
) -> Memory | None:
    """Memory of a process that runs only one way; None if the system does not report it."""
    if platform.system() != "Linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network.pt"
        torch.save((merged, x), network)
        short = str(dtype).removeprefix("torch.")
        arguments = [str(network), way, short, str(torch.get_num_threads()), str(file), str(int(keep_memory))]
        command = [sys.executable, "-m", "replknet.bench.against", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ProcessError(f"the process that measures memory ended with {result.returncode}, not 0: {last[0]}")
    return Memory(**json.loads(result.stdout))


def _run_alone(network: str, way: str, dtype: str, threads: str, file: str, keep_memory: str) -> Memory:
    """Measure the memory of this process, which has done nothing else."""
    torch.set_num_threads(int(threads))
    if int(keep_memory):
        keep_freed_memory()
    # safe: this package wrote the file a moment ago
    merged, x = torch.load(network, weights_only=False)
    if way in _APART:
        importlib.import_module(way)
    program = _resident() - sum(p.nbytes for p in (*merged.parameters(), *merged.buffers())) - x.nbytes
    with torch.inference_mode():
        call = _call(way, merged, x, getattr(torch, dtype), Path(file))
        del merged
        gc.collect()
        # give back the freed memory that glibc keeps
        ctypes.CDLL(None).malloc_trim(0)
        held = _resident()
        # reset the peak, which so far is the peak of building the way
        Path("/proc/self/clear_refs").write_text("5")
        call()
        call()
    return Memory(held - program, _status("VmHWM") - program)


def _resident() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


if __name__ == "__main__":
    print(json.dumps(asdict(_run_alone(*sys.argv[1:]))))
