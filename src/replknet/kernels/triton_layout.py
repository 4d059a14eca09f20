"""Copies of images to the layout and width that the patch kernels see, and back.

The patch kernels see contiguous rows of a good width. A copy goes through tiles of pixels and channels, so that whole
lines are read and written: the compiler transposes a tile in shared memory.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_launch import Launch

_PIXELS = 64
_CHANNELS = 64


@triton.jit(do_not_specialize=["pixel_blocks", "height", "units_from", "units_to"])
def _copy(
    x,  # [N, C, height, from], or [N, height, from, C] for LAST_FROM
    y,  # [N, C, height, to], or [N, height, to, C] for LAST_TO; columns from `from` on are zeros
    channels,
    pixel_blocks,
    channel_blocks,
    height,
    units_from,  # of a row
    units_to,
    UNIT_FROM: tl.constexpr,  # pixels
    UNIT_TO: tl.constexpr,
    SAME: tl.constexpr,  # the widths are equal
    LAST_FROM: tl.constexpr,  # channels_last
    LAST_TO: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,  # an image has 2^31 elements or more
):
    width_from, width_to = units_from * UNIT_FROM, units_to * UNIT_TO
    block = tl.program_id(0) // channel_blocks
    image = (block // pixel_blocks).to(tl.int64)
    p = (block % pixel_blocks * PIXELS + tl.arange(0, PIXELS))[:, None]
    c = (tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    if WIDE:
        p, c = p.to(tl.int64), c.to(tl.int64)
    exists = (p < height * width_to) & (c < channels)
    if SAME:
        q = p
        there = exists
    else:
        q = p // width_to * width_from + p % width_to
        there = exists & (p % width_to < width_from)
    from_ = q * channels + c if LAST_FROM else c * (height * width_from) + q
    to = p * channels + c if LAST_TO else c * (height * width_to) + p
    pixels = tl.load(x + image * channels * height * width_from + from_, mask=there, other=0.0)
    tl.store(y + image * channels * height * width_to + to, pixels, mask=exists)


def copy(shape: tuple[int, int, int, int], width: int, last_from: bool, last_to: bool) -> Callable[[Tensor], Tensor]:
    """A function that copies images to another layout and width.

    Args:
        shape: shape of the images, `[N,C,H,W]`.
        width: columns of the result. Columns from W on are zeros; a width below W leaves the last columns out.
        last_from: whether the images are channels_last; else they are contiguous.
        last_to: whether the result is channels_last; else it is contiguous.

    Returns:
        A function that takes images of any dtype and returns `[N,C,H,width]`.
    """
    n, c, h, w = shape
    pixel_blocks, channel_blocks = triton.cdiv(h * width, _PIXELS), triton.cdiv(c, _CHANNELS)
    unit_from, unit_to = (8 if columns % 8 == 0 else 1 for columns in (w, width))
    launch = Launch(
        _copy,
        n * pixel_blocks * channel_blocks,
        (c, pixel_blocks, channel_blocks, h, w // unit_from, width // unit_to),
        {
            "UNIT_FROM": unit_from,
            "UNIT_TO": unit_to,
            "SAME": w == width,
            "LAST_FROM": last_from,
            "LAST_TO": last_to,
            "PIXELS": _PIXELS,
            "CHANNELS": _CHANNELS,
            "WIDE": h * max(w, width) * c >= 2**31,
        },
        # pixels that are copied one by one have many addresses, which would spill registers of four warps
        num_warps=4 if unit_from == unit_to == 8 else 8,
    )
    result = n, c, h, width
    strides = (h * width * c, 1, width * c, c) if last_to else (c * h * width, h * width, width, 1)

    def run(x: Tensor) -> Tensor:
        y = x.new_empty_strided(result, strides)
        launch(x, y)
        return y

    return run
