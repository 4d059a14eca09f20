"""A call of the operator, or of its gradient for the weights, with a given tile: copies of layout, then a kernel.

`run_of` and `gradient_of` prepare once everything that calls of one kind share. A call itself is then a few allocations
and launches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from replknet.kernels.triton_plan import DirectTile, PatchTile, Run, RunGradient, Tile, Work, padded_width


def work_of(x: Tensor, kernel: tuple[int, int], bias: bool = False, relu: bool = False, rotated: bool = False) -> Work:
    """The `Work` of these arguments; every tap of the kernel must meet the map somewhere."""
    n, c, h, w = x.shape
    return Work(
        shape=(n, c, h, w),
        kernel=kernel,
        dtype=x.dtype,
        device=x.get_device(),
        channels_last=not x.is_contiguous(),
        tf32=x.dtype == torch.float32 and allows_tf32(),
        bias=bias,
        relu=relu,
        rotated=rotated,
    )


def allows_tf32() -> bool:
    """Whether float32 convolutions may multiply in TF32: torch's own switch for them, which is on by default."""
    # torch's stubs lack this name; the older one, allow_tf32, raises once a program has used this one
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def aligned(t: Tensor) -> Tensor:
    """`t`, or a copy if its first element does not lie at a multiple of 16 bytes, as the kernels need."""
    return t.clone(memory_format=torch.preserve_format) if t.data_ptr() & 15 else t


@dataclass(frozen=True, slots=True, eq=False)
class Copied:
    """A `Run` on contiguous copies of some width; its result is copied back."""

    inside: Run
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    width: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.back(self.inside(self.to(x), weight, bias))


@dataclass(frozen=True, slots=True, eq=False)
class CopiedGradient:
    """A `RunGradient` on contiguous copies of some width."""

    inside: RunGradient
    to: Callable[[Tensor], Tensor]
    width: int

    def __call__(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.inside(self.to(dy), self.to(x))


def both(run: Run, gradient: RunGradient, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients for x and for the weights; a copy of dy that both need is made once."""
    if isinstance(run, Copied) and isinstance(gradient, CopiedGradient) and run.width == gradient.width:
        planes = run.to(dy)
        return run.back(run.inside(planes, weight, None)), gradient.inside(planes, gradient.to(x))
    return run(dy, weight, None), gradient(dy, x)


@lru_cache(4096)
def run_of(tile: Tile, work: Work) -> Run:
    """The `Run` of a tile for a call; its result has the layout of x."""
    from replknet.kernels import triton_direct, triton_layout, triton_patch, triton_plane

    if isinstance(tile, DirectTile):
        return triton_direct.forward(work, tile)
    n, c, h, w = work.shape
    width = padded_width(w, copied=work.channels_last or _any_size(tile))
    seen = replace(work, shape=(n, c, h, width), channels_last=False)
    kernel = (triton_patch if isinstance(tile, PatchTile) else triton_plane).forward
    inside = kernel(seen, tile)
    if seen == work:
        return inside
    to = triton_layout.copy(work.shape, width, work.channels_last, False)
    back = triton_layout.copy(seen.shape, w, False, work.channels_last)
    return Copied(inside, to, back, width)


@lru_cache(4096)
def gradient_of(tile: Tile, work: Work) -> RunGradient:
    """The `RunGradient` of a tile for a call."""
    from replknet.kernels import triton_direct, triton_layout, triton_patch

    n, c, h, w = work.shape
    direct = isinstance(tile, DirectTile)
    width = w if direct else padded_width(w, copied=work.channels_last or _any_size(tile))
    seen = replace(work, shape=(n, c, h, width), channels_last=False)
    kernel = (triton_direct if direct else triton_patch).weight_gradient
    inside = kernel(seen, tile)
    if seen == work:
        return inside
    to = triton_layout.copy(work.shape, width, work.channels_last, False)
    return CopiedGradient(inside, to, width)


def _any_size(tile: Tile) -> bool:
    return isinstance(tile, PatchTile) and tile.any_size


def run(tile: Tile, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, rotated: bool = False) -> Tensor:
    """The convolution with a given tile, in the layout of `x`; every tap must meet the map somewhere."""
    kernel = weight.shape[2], weight.shape[3]
    return run_of(tile, work_of(x, kernel, bias is not None, relu, rotated))(x, weight, bias)


def run_gradient(tile: Tile, dy: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """The gradient for the weights with a given tile; every tap must meet the map somewhere."""
    return gradient_of(tile, work_of(x, (kh, kw)))(dy, x)
