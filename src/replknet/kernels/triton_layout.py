"""Images in the layout that the patch kernels see, contiguous rows of a good width, and back: one copy each way.

A copy goes through tiles of pixels and channels, so that both sides are read and written in whole lines: the compiler
turns a tile in shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 64
_CHANNELS = 64


@triton.jit
def _planes(
    x,  # [N, C, H, W], or [N, H, W, C] for LAST
    planes,  # [N, C, H, TO], zeros from W on
    channels,
    pixel_blocks,
    H: tl.constexpr,
    W: tl.constexpr,
    TO: tl.constexpr,
    LAST: tl.constexpr,  # channels_last
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,  # an image has 2^31 elements or more
):
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    p = (tl.program_id(0) % pixel_blocks * PIXELS + tl.arange(0, PIXELS))[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    if WIDE:
        p, c = p.to(tl.int64), c.to(tl.int64)
    row, column = p // TO, p % TO
    start = image * channels * H * W
    at = (row * W + column) * channels + c if LAST else c * (H * W) + row * W + column
    exists = (p < H * TO) & (c < channels)
    pixels = tl.load(x + start + at, mask=exists & (column < W), other=0.0)
    tl.store(planes + image * channels * H * TO + c * (H * TO) + p, pixels, mask=exists)


@triton.jit
def _images(
    planes,  # [N, C, H, FROM]
    y,  # [N, C, H, W], or [N, H, W, C] for LAST
    channels,
    pixel_blocks,
    H: tl.constexpr,
    W: tl.constexpr,
    FROM: tl.constexpr,
    LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    p = (tl.program_id(0) % pixel_blocks * PIXELS + tl.arange(0, PIXELS))[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    if WIDE:
        p, c = p.to(tl.int64), c.to(tl.int64)
    exists = (p < H * W) & (c < channels)
    from_ = image * channels * H * FROM + c * (H * FROM) + p // W * FROM + p % W
    pixels = tl.load(planes + from_, mask=exists)
    to = p * channels + c if LAST else c * (H * W) + p
    tl.store(y + image * channels * H * W + to, pixels, mask=exists)


def _blocks(pixels: int, channels: int) -> tuple[int, int]:
    return (
        min(_PIXELS, triton.next_power_of_2(pixels)),
        min(_CHANNELS, triton.next_power_of_2(channels)),
    )


def planes(x: Tensor, width: int) -> Tensor:
    """Images `[N,C,H,W]` of either layout as contiguous ones `[N,C,H,width]`, with zeros from W on."""
    n, c, h, w = x.shape
    result = torch.empty((n, c, h, width), dtype=x.dtype, device=x.device)
    pixels, channels = _blocks(h * width, c)
    pixel_blocks = triton.cdiv(h * width, pixels)
    _planes[(n * pixel_blocks, triton.cdiv(c, channels))](
        x,
        result,
        c,
        pixel_blocks,
        H=h,
        W=w,
        TO=width,
        LAST=not x.is_contiguous(),
        PIXELS=pixels,
        CHANNELS=channels,
        WIDE=h * width * c >= 2**31,
        num_warps=4,
    )
    return result


def images(x: Tensor, width: int, layout: torch.memory_format) -> Tensor:
    """The first `width` columns of contiguous images `[N,C,H,W]`, in a layout: `[N,C,H,width]`."""
    n, c, h, w = x.shape
    result = torch.empty((n, c, h, width), dtype=x.dtype, device=x.device, memory_format=layout)
    pixels, channels = _blocks(h * width, c)
    pixel_blocks = triton.cdiv(h * width, pixels)
    _images[(n * pixel_blocks, triton.cdiv(c, channels))](
        x,
        result,
        c,
        pixel_blocks,
        H=h,
        W=width,
        FROM=w,
        LAST=not result.is_contiguous(),
        PIXELS=pixels,
        CHANNELS=channels,
        WIDE=h * w * c >= 2**31,
        num_warps=4,
    )
    return result
