"""Images copied to the layout and width that the patch kernels see, contiguous rows of a good width, and back.

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
def _copy(
    x,  # [N, C, H, FROM], or [N, H, FROM, C] for LAST_FROM
    y,  # [N, C, H, TO], or [N, H, TO, C] for LAST_TO; zeros from FROM on
    channels,
    pixel_blocks,
    H: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    LAST_FROM: tl.constexpr,  # channels_last
    LAST_TO: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,  # an image has 2^31 elements or more
):
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    p = (tl.program_id(0) % pixel_blocks * PIXELS + tl.arange(0, PIXELS))[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    if WIDE:
        p, c = p.to(tl.int64), c.to(tl.int64)
    exists = (p < H * TO) & (c < channels)
    q = p // TO * FROM + p % TO
    from_ = q * channels + c if LAST_FROM else c * (H * FROM) + q
    to = p * channels + c if LAST_TO else c * (H * TO) + p
    pixels = tl.load(x + image * channels * H * FROM + from_, mask=exists & (p % TO < FROM), other=0.0)
    tl.store(y + image * channels * H * TO + to, pixels, mask=exists)


def copied(x: Tensor, width: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Images of either layout in another layout and width.

    Args:
        x: `[N,C,H,W]`, contiguous or channels_last, any dtype.
        width: columns of the result; those from W on are zeros, and fewer than W leave the last ones out.
        layout: contiguous or channels_last.

    Returns:
        `[N,C,H,width]`, dtype of `x`.
    """
    n, c, h, w = x.shape
    y = torch.empty((n, c, h, width), dtype=x.dtype, device=x.device, memory_format=layout)
    pixels = min(_PIXELS, triton.next_power_of_2(h * width))
    channels = min(_CHANNELS, triton.next_power_of_2(c))
    pixel_blocks = triton.cdiv(h * width, pixels)
    _copy[(n * pixel_blocks, triton.cdiv(c, channels))](
        x,
        y,
        c,
        pixel_blocks,
        H=h,
        FROM=w,
        TO=width,
        LAST_FROM=not x.is_contiguous(),
        LAST_TO=not y.is_contiguous(),
        PIXELS=pixels,
        CHANNELS=channels,
        WIDE=h * max(w, width) * c >= 2**31,
        num_warps=4,
    )
    return y
