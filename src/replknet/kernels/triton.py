"""The Triton kernels on GPUs, asked for by name: matrix products for large kernels, else sums.

Nobody needs to ask: on a CUDA device `measured` uses these kernels where they are faster than torch's own convolution.
Asked for by name, they run even where they are slower, and their errors are raised. Triton's own switch
`TRITON_INTERPRET=1` lets them take calls on a CPU, slowly.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch

from replknet.kernels.backend import Backend, Call
from replknet.kernels.triton_choice import BY_NAME, Question
from replknet.kernels.triton_device import device_at
from replknet.kernels.triton_plan import Work
from replknet.kernels.triton_run import allows_tf32
from replknet.kernels.triton_tune import kind_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)


@cache
def _interpreting() -> bool:
    # Triton reads the variable once, when kernels are defined
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def refusal_on_device(call: Call) -> str | None:
    """Why the kernels cannot take a call on a CUDA device, or None."""
    if not _has_triton():
        return "needs the package triton"
    if call.algorithm == "fft":
        return "has no Fourier transforms"
    if call.algorithm == "direct":
        return 'spreads an infinity or NaN beyond the outputs that see it; "direct" must not'
    if call.dtype not in _DTYPES:
        return "takes float32, float16 and bfloat16"
    if call.device != "cuda":
        return "runs on CUDA devices only"
    if torch.version.hip is not None:
        return "runs on NVIDIA devices only; this torch is for AMD devices"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if call.index >= torch.cuda.device_count():
        return f"there is no device cuda:{call.index}"
    found = torch.cuda.get_device_capability(call.index)
    if found < _CAPABILITY:
        return f"needs a device of capability 8.0 or more, cuda:{call.index} has {found[0]}.{found[1]}"
    return None


def _refusal(call: Call) -> str | None:
    if (
        call.device == "cpu"
        and _interpreting()
        and _has_triton()
        and call.dtype in _DTYPES
        and call.algorithm == "auto"
    ):
        return None
    return refusal_on_device(call)


def explanation(call: Call) -> list[str]:
    """For each direction, what was timed on this device; the shipped tile where nothing was timed."""
    index = call.index if call.device == "cuda" and torch.cuda.is_available() else -1
    device, (_, _, h, w) = device_at(index), call.shape
    kernel = min(call.kernel[0], 2 * h - 1), min(call.kernel[1], 2 * w - 1)
    tf32 = call.dtype == torch.float32 and allows_tf32()
    lines = []
    for direction in ("forward", "dx", "dw"):
        work = Work(
            shape=call.shape,
            kernel=kernel,
            dtype=call.dtype,
            device=index,
            channels_last=call.channels_last,
            tf32=tf32,
            rotated=direction == "dx",
        )
        question = Question(direction, work, call.kernel)
        entry = device.table[kind_of(direction, work)] if index >= 0 else None
        if entry is None:
            lines.append(f"{direction}: not timed here; the tile that ships is {question.tiles()[0]}")
            continue
        times = [f"{entry.tile} {entry.ms:.3g} ms"] if entry.tile is not None else ["no tile fits"]
        times += [f"torch {entry.torch_ms:.3g} ms"] if entry.torch_ms is not None else []
        lines.append(f"{direction}: {', '.join(times)}")
    return lines


BACKEND = Backend(
    name="triton",
    refusal=_refusal,
    forward=BY_NAME.forward,
    backward=BY_NAME.backward,
    automatic=False,
    explanation=explanation,
)
