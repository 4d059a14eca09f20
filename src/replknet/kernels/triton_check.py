"""Whether a Triton kernel may be trusted on a device: its numbers must agree with the definition there."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from replknet.kernels import reference
from replknet.kernels.triton_plan import Tile, Work
from replknet.kernels.triton_run import gradient_of, run_of

# size of the comparison: enough to reach every part of a kernel, and little work for a CPU
_IMAGES, _CHANNELS, _ROWS, _COLUMNS = 2, 3, 20, 96
# allowed error, relative to the sum of |products|: for float32 sums in any order, and for factors of 11 bits
_SUMS, _TF32 = 2.0**-20, 2.0**-9


def check_name(direction: str, tile: Tile, work: Work) -> str:
    """The name of a check, made once for a device: a kind of kernel in one direction and dtype."""
    number = "tf32" if work.tf32 else str(work.dtype).removeprefix("torch.")
    return f"{direction} {type(tile).__name__.removesuffix('Tile').lower()} {number}"


def excess(direction: str, tile: Tile, work: Work, device: torch.device) -> float:
    """The largest error of a kernel in a small call, as a multiple of what arithmetic allows; at most 1 is right.

    The small call takes the machine code of the call in question, so nothing is compiled for it alone.

    Args:
        direction: "forward", "dx" or "dw".
        tile: the tile of the kernel.
        work: the call in question.
        device: where the small call runs.
    """
    small = _small(work)
    x, other, bias, expected, allowed = _example(direction, small)
    layout = torch.channels_last if small.channels_last else torch.contiguous_format
    x = x.to(device, memory_format=layout)
    here = replace(small, device=x.get_device())
    if direction == "dw":
        found = gradient_of(tile, here)(other.to(device, memory_format=layout), x)
    else:
        found = run_of(tile, here)(x, other.to(device), bias.to(device) if small.bias else None)
    error = (found.cpu().double() - expected).abs() / allowed
    return float("inf") if error.isnan().any() else error.max().item()


def _small(work: Work) -> Work:
    _, _, h, w = work.shape
    kh, kw = work.kernel
    rows = max(_ROWS, kh // 2 + 1)
    # the width modulo 8 stays: the machine code depends on it
    columns = max(_COLUMNS, (kw // 2 // 8 + 1) * 8) + w % 8
    return replace(work, shape=(_IMAGES, _CHANNELS, min(h, rows), min(w, columns)), device=-1)


@lru_cache(8)
def _example(direction: str, work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (dy for "dx"), weight (dy for "dw"), bias, the expected result in float64, and the allowed error."""
    random = torch.Generator().manual_seed(0)
    n, c, h, w = work.shape
    kh, kw = work.kernel
    shapes = (n, c, h, w), (n, c, h, w) if direction == "dw" else (c, 1, kh, kw), (c,)
    x, other, bias = (torch.randn(shape, generator=random).to(work.dtype) for shape in shapes)
    expected = _defined(direction, work, x.double(), other.double(), bias.double())
    terms = _defined(direction, work, x.double().abs(), other.double().abs(), bias.double().abs())
    eps = torch.finfo(work.dtype).eps
    return x, other, bias, expected, eps * expected.abs() + (_TF32 if work.tf32 else _SUMS) * terms


def _defined(direction: str, work: Work, x: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    if direction == "forward":
        return reference.forward(x, other, bias if work.bias else None, work.relu)
    if direction == "dx":
        found, _, _ = reference.backward(x, x, other, [True, False, False])
    else:
        weight = x.new_empty(x.shape[1], 1, *work.kernel)
        _, found, _ = reference.backward(other, x, weight, [False, True, False])
    assert found is not None
    return found
