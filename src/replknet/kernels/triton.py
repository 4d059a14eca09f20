"""The Triton kernels on GPUs: patches on tensor cores, sums for small kernels and for exact float32.

Never measured on a GPU, and checked in Triton's interpreter and by compilation alone; so it is taken only by name
(`replknet.use_backend("triton")`). With `TRITON_INTERPRET=1`, Triton's own switch, it takes calls on a CPU, slowly.
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
    gradient_tile,
    padded_width,
)

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
    kernel = used.shape[2], used.shape[3]
    shape = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    tile = forward_tile(shape, kernel, x.dtype, _allows_tf32(), not x.is_contiguous(), _family(x))
    return run(tile, x, used, bias, relu, rotated)


def run(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rotated: bool = False) -> Tensor:
    """The convolution with a given tile; no tap may meet padding alone."""
    from replknet.kernels import triton_direct, triton_patch

    if isinstance(tile, DirectTile):
        return triton_direct.forward(x, weight, bias, relu, tile, rotated)
    w = x.shape[3]
    wide = padded_width(w, tile)
    y = triton_patch.forward(_padded(x, wide), weight, bias, relu, tile, rotated)
    return y if wide == w else y[:, :, :, :w]


def run_gradient(tile: Tile, dy: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """The gradient of such a weight with a given tile."""
    from replknet.kernels import triton_direct, triton_patch

    if isinstance(tile, DirectTile):
        return triton_direct.weight_gradient(dy.contiguous(), x.contiguous(), kh, kw, tile)
    wide = padded_width(x.shape[3], tile)
    return triton_patch.weight_gradient(_padded(dy, wide), _padded(x, wide), kh, kw, tile)


def _padded(x: Tensor, w: int) -> Tensor:
    return x.contiguous() if x.shape[3] == w else pad(x.contiguous(), (0, w - x.shape[3]))


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
            shape = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
            tile = gradient_tile(shape, kernel, x.dtype, _allows_tf32(), _family(x))
            dw = pad(run_gradient(tile, dy, x, *kernel), (mw, mw, mh, mh))
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
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        return f"needs a device of capability 8.0 or more, this one has {found[0]}.{found[1]}"
    return None


BACKEND = Backend(name="triton", refusal=_refusal, forward=forward, backward=backward, automatic=False)
