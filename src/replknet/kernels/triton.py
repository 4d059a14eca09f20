"""The Triton kernels on GPUs: patches on tensor cores, sums for small kernels and for exact float32.

Right on an H100, but timed there for seven large kernels in bfloat16 alone (docs/results/operator-gpu.md); so it is
taken only by name (`replknet.use_backend("triton")`). With `TRITON_INTERPRET=1`, Triton's own switch, it takes calls on
a CPU, slowly.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from replknet.kernels.aten import inner, margins
from replknet.kernels.backend import Backend, Call
from replknet.kernels.triton_plan import (
    DirectTile,
    Family,
    Tile,
    family,
    forward_tile,
    forward_tiles,
    gradient_tile,
    gradient_tiles,
    padded_width,
)
from replknet.kernels.triton_tune import Table, autotuned, kind_of, table_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)


@cache
def _interpreting() -> bool:
    # Triton reads it once, when kernels are defined
    return os.environ.get("TRITON_INTERPRET") == "1"


def _allows_tf32() -> bool:
    # the older flag, torch.backends.cuda.matmul.allow_tf32, raises once a program has used this one
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _family(x: Tensor) -> Family:
    return "sm_90" if x.device.type != "cuda" else family(torch.cuda.get_device_capability(x.device))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rotated: bool = False) -> Tensor:
    used = inner(weight, *margins(weight, *x.shape[2:])).contiguous()
    call = _shape(x), (used.shape[2], used.shape[3]), x.dtype, _allows_tf32(), not x.is_contiguous()
    tile = forward_tile(*call, _family(x))
    if (table := _table(x)) is not None:
        tile = table.tile(
            kind_of("forward", *call),
            tile,
            lambda: forward_tiles(*call, _family(x)),
            lambda tile: run(tile, x, used, bias, relu, rotated),
        )
    return run(tile, x, used, bias, relu, rotated)


def _weight_gradient(dy: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    call = _shape(x), kernel, x.dtype, _allows_tf32()
    tile = gradient_tile(*call, _family(x))
    if (table := _table(x)) is not None:
        tile = table.tile(
            kind_of("gradient", *call, not x.is_contiguous()),
            tile,
            lambda: gradient_tiles(*call, _family(x)),
            lambda tile: run_gradient(tile, dy, x, *kernel),
        )
    return run_gradient(tile, dy, x, *kernel)


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2], x.shape[3]


def _table(x: Tensor) -> Table | None:
    """The timed tiles of the device of `x`, or None where nothing is timed."""
    if not x.is_cuda or not autotuned() or torch.are_deterministic_algorithms_enabled():
        return None
    return table_of(x.get_device())


def run(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rotated: bool = False) -> Tensor:
    """The convolution with a given tile, in the layout of `x`; no tap may meet padding alone."""
    from replknet.kernels import triton_direct, triton_layout, triton_patch

    if isinstance(tile, DirectTile):
        return triton_direct.forward(x, weight, bias, relu, tile, rotated)
    planes = _planes(x)
    y = triton_patch.forward(planes, weight, bias, relu, tile, rotated)
    if planes is x:
        return y
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return triton_layout.copied(y, x.shape[3], layout)


def run_gradient(tile: Tile, dy: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """The gradient of such a weight with a given tile."""
    from replknet.kernels import triton_direct, triton_layout, triton_patch

    if isinstance(tile, DirectTile):
        dy, x = (t if t.is_contiguous() else triton_layout.copied(t, t.shape[3]) for t in (dy, x))
        return triton_direct.weight_gradient(dy, x, kh, kw, tile)
    return triton_patch.weight_gradient(_planes(dy), _planes(x), kh, kw, tile)


def _planes(x: Tensor) -> Tensor:
    """Images as the patch kernels take them; `x` itself if it is like that."""
    from replknet.kernels import triton_layout

    width = padded_width(x.shape[3], copied=not x.is_contiguous())
    return x if width == x.shape[3] and x.is_contiguous() else triton_layout.copied(x, width)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "direct") -> Tensor:
    with _device(x):
        return _convolved(x, weight, None if bias is None else bias.contiguous(), relu)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "direct"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dw = None
    with _device(x):
        if wanted[0]:
            dx = _convolved(dy, weight, None, False, rotated=True)
        if wanted[1]:
            mh, mw = margins(weight, *x.shape[2:])
            kernel = weight.shape[2] - 2 * mh, weight.shape[3] - 2 * mw
            dw = pad(_weight_gradient(dy, x, kernel), (mw, mw, mh, mh))
        db = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype) if wanted[2] else None
    return dx, dw, db


def _device(x: Tensor) -> torch.cuda.device_of:
    # Triton starts kernels on the current device and its current stream; nothing happens for a CPU's tensor
    return torch.cuda.device_of(x)


def _refusal(call: Call) -> str | None:
    if find_spec("triton") is None:
        return "needs the package triton"
    if call.algorithm == "fft":
        return "has only the direct algorithm"
    if call.dtype not in _DTYPES:
        return "takes float32, float16 and bfloat16"
    if call.device == "cpu" and _interpreting():
        return None
    if call.device != "cuda":
        return "runs on CUDA devices only"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = _least_capability()
    if found < _CAPABILITY:
        return f"needs devices of capability 8.0 or more, there is one of {found[0]}.{found[1]}"
    return None


@cache
def _least_capability() -> tuple[int, int]:
    # a call does not say which device it is on
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def _explanation(call: Call) -> list[str]:
    kernel = min(call.kernel[0], 2 * call.shape[2] - 1), min(call.kernel[1], 2 * call.shape[3] - 1)
    on_device = torch.cuda.is_available()
    device = family(torch.cuda.get_device_capability()) if on_device else "sm_90"
    facts = call.shape, kernel, call.dtype, _allows_tf32()
    tiles: dict[str, Tile] = {
        "forward": forward_tile(*facts, call.channels_last, device),
        "gradient": gradient_tile(*facts, device),
    }
    lines = []
    for direction, shipped in tiles.items():
        kind = kind_of(direction, *facts, call.channels_last)
        timed = table_of(torch.cuda.current_device())[kind] if on_device and autotuned() else None
        lines.append(f"{direction}: {shipped} as it ships" if timed is None else f"{direction}: {timed}, timed here")
    return lines


BACKEND = Backend(
    name="triton",
    refusal=_refusal,
    forward=forward,
    backward=backward,
    automatic=False,
    explanation=_explanation,
)
