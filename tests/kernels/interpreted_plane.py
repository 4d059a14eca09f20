"""The plane kernels in Triton's interpreter, against the float64 definition: a group of interpreted.py."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

from oracle import excess_of
from replknet.kernels import reference, triton_plane, triton_run
from replknet.kernels.aten import inner, margins
from replknet.kernels.triton_plan import PlaneTile

HALF, BRAIN = torch.float16, torch.bfloat16
PATCHES, FLAT = PlaneTile(samples=16), PlaneTile(samples=16, rows=0)

# (n, c, h, w, kh, kw), dtype, tile, channels_last
CASES = [
    # images that do not fill the rows of a product
    ((3, 2, 16, 16, 31, 31), BRAIN, PATCHES, False),
    ((18, 8, 7, 7, 13, 13), BRAIN, FLAT, False),
    # odd sides; kernels of several numbers of row blocks, some of which see little of the map
    ((2, 1, 16, 5, 13, 9), HALF, PATCHES, False),
    ((2, 1, 1, 16, 1, 31), HALF, PATCHES, False),
    ((1, 8, 1, 1, 1, 1), BRAIN, FLAT, False),
    # maps whose first elements lie anywhere
    ((18, 3, 7, 7, 7, 7), HALF, FLAT, False),
    # copied, and widened
    ((3, 2, 14, 14, 9, 27), BRAIN, PATCHES, True),
]
MORE_CASES = [
    ((17, 1, 14, 14, 27, 27), HALF, PATCHES, False),
    ((16, 16, 7, 8, 5, 7), HALF, FLAT, False),
    ((5, 3, 9, 12, 7, 9), BRAIN, PATCHES, False),
    ((66, 2, 13, 13, 5, 25), BRAIN, PlaneTile(samples=64), False),
    ((16, 2, 15, 16, 3, 1), HALF, PATCHES, False),
    ((2, 8, 6, 9, 11, 17), HALF, FLAT, False),
    # a map that fills the window
    ((5, 2, 8, 8, 15, 3), BRAIN, FLAT, False),
    ((33, 24, 3, 5, 5, 9), BRAIN, PlaneTile(samples=32, rows=0), False),
    ((18, 3, 7, 7, 13, 13), HALF, FLAT, True),
]


def before_a_wall(x: Tensor) -> Tensor:
    """A copy that ends where memory does: to read more is a segmentation fault."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    found = np.frombuffer(memory, np.int16)
    wall = found.ctypes.data + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    end = pages * mmap.PAGESIZE // 2
    copy = torch.from_numpy(found[end - x.numel() : end]).view(x.dtype).view(x.shape)
    return copy.copy_(x)


def errors_of(full: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each case, and its largest errors as multiples of the bound."""
    # NaN goes through the products on purpose
    with np.errstate(invalid="ignore"):
        for (n, c, h, w, kh, kw), dtype, tile, channels_last in CASES + (MORE_CASES if full else []):
            name = str(((n, c, h, w, kh, kw), dtype, tile, channels_last))
            x, dy = (torch.randn(n, c, h, w).to(dtype) for _ in range(2))
            weight = (torch.randn(c, 1, kh, kw) / max(kh, kw)).to(dtype)
            weight = inner(weight, *margins(weight, h, w)).contiguous()
            bias = torch.randn(c).to(dtype)
            convolved = partial(call, weight=weight, tile=tile, channels_last=channels_last)
            yield name, errors(convolved, x, weight, dy, bias)


def call(x: Tensor, bias: Tensor | None, rotated: bool, weight: Tensor, tile: PlaneTile, channels_last: bool) -> Tensor:
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        return triton_run.run(tile, x, weight, bias, relu=bias is not None, rotated=rotated)
    kernel = weight.shape[2], weight.shape[3]
    work = triton_run.work_of(x, kernel, bias is not None, relu=bias is not None, rotated=rotated)
    return triton_plane.forward(work, tile)(before_a_wall(x), before_a_wall(weight), bias)


def errors(convolved: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor) -> dict[str, float]:
    # the gradients that these kernels do not compute are the true ones
    _, dw, db = reference.BACKEND.backward(dy.double(), x.double(), weight.double(), [True] * 3, "direct")
    y = convolved(x, bias, False)
    got = {"y": y, "dx": convolved(dy, None, True), "dw": dw, "db": db}
    # one map of which no pixel is finite
    one = x.shape[0] // 2, x.shape[1] // 2
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[one] = False
    bad = x.clone()
    bad[one] = torch.nan
    found = convolved(bad, bias, False)
    assert torch.equal(found[others], y[others]), "NaN has reached other maps"
    assert found[one].isnan().all(), "ReLU has lost NaN"
    return excess_of(got, x, weight, dy, bias=bias, relu=True)
