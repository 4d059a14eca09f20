"""Sums of products in float32 on a GPU's ordinary arithmetic: exact float32, and small kernels of any type.

Forward, a program works on ROWS output rows, some samples and some channels. A sample is a position in a row of an
image; the samples of a program may lie in several images. Each input row is loaded once for all output rows that see
it, so there are ROWS multiplications for each load. Both layouts are read as they are. The gradient for x is the
convolution with the rotated kernel.

The gradient for the weights is a sum over the images and rows of x. Its terms are matrix products in float32:
dy[rows of the kernel, w] @ X[w, columns of the kernel], where X[w, j] = x[w + j - Kw // 2].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_launch import Launch
from replknet.kernels.triton_plan import DirectTile, Run, RunGradient, Work


@triton.jit(do_not_specialize=["images", "programs", "height", "width"])
def _forward(
    x,
    taps,  # [C, KH, KW], or [KH, KW, C] for channels_last
    bias,
    y,
    images,
    channels,
    programs,  # of a block of channels
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,  # channels_last
    ROTATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LONG: tl.constexpr,  # the batch has 2^31 elements or more
    WIDE: tl.constexpr,  # an image has 2^31 elements or more
):
    row_blocks = (height + ROWS - 1) // ROWS
    block = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    top = part % row_blocks * ROWS
    position = part // row_blocks * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    image, column = position // width, position % width
    if LONG:
        image = image.to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = (image < images) & (channel < channels)
    if WIDE:
        column, channel, top = column.to(tl.int64), channel.to(tl.int64), top.to(tl.int64)
    if LAST:
        start = image * height * width * channels + channel
        pixel = channels
        tap = taps + channel
        next_tap = channels
    else:
        start = (image * channels + channel) * height * width
        pixel = 1
        tap = taps + channel * (KH * KW)
        next_tap = 1
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((SAMPLES, CHANNELS), tl.float32),)
    # rows of the image, relative to the first row that the kernel reaches
    first = tl.maximum(0, KH // 2 - top)
    last = tl.minimum(ROWS + KH - 1, height + KH // 2 - top)
    for j in tl.range(tl.maximum(0, KW // 2 - width + 1), tl.minimum(KW, width + KW // 2)):
        w = column + (j - KW // 2)
        inside = exists & (w >= 0) & (w < width)
        for i in tl.range(first, last):
            pixels = tl.load(x + start + ((top + i - KH // 2) * width + w) * pixel, mask=inside, other=0.0).to(
                tl.float32
            )
            for r in tl.static_range(ROWS):
                row = i - r
                at = (KH - 1 - row) * KW + KW - 1 - j if ROTATED else row * KW + j
                has_tap = (channel < channels) & (row >= 0) & (row < KH)
                factor = tl.load(tap + at * next_tap, mask=has_tap, other=0.0).to(tl.float32)
                sums = sums[:r] + (sums[r] + pixels * factor,) + sums[r + 1 :]
    for r in tl.static_range(ROWS):
        result = sums[r]
        if HAS_BIAS:
            result += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        to = y + start + ((top + r) * width + column) * pixel
        tl.store(to, result.to(y.dtype.element_ty), mask=exists & (top + r < height))


@triton.jit(do_not_specialize=["images", "splits", "height", "width"])
def _products(
    x,
    dy,
    products,  # [C, splits, KH, KW]
    images,
    channels,
    splits,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_H: tl.constexpr,  # taps
    BLOCK_W: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCKS_W: tl.constexpr = (KW + BLOCK_W - 1) // BLOCK_W
    BLOCKS: tl.constexpr = (KH + BLOCK_H - 1) // BLOCK_H * BLOCKS_W
    block = tl.program_id(0) % BLOCKS
    split = tl.program_id(0) // BLOCKS % splits
    channel = (tl.program_id(0) // BLOCKS // splits).to(tl.int64)
    i = block // BLOCKS_W * BLOCK_H + tl.arange(0, BLOCK_H)
    j = block % BLOCKS_W * BLOCK_W + tl.arange(0, BLOCK_W)
    p = tl.arange(0, PIXELS)
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for step in tl.range(split, images * height, splits):
        plane = (step // height * channels + channel) * height * width
        row = step % height
        start = plane + tl.full((), row, tl.int64) * width
        # the row of dy that meets this row of x at tap row i
        h = row - i + KH // 2
        if WIDE:
            h = h.to(tl.int64)
        for left in tl.range(0, width, PIXELS):
            w = left + p
            is_row = (h >= 0) & (h < height) & (i < KH)
            g = tl.load(
                dy + plane + (h * width)[:, None] + w[None, :], mask=is_row[:, None] & (w < width)[None, :], other=0.0
            )
            v = w[:, None] + j[None, :] - KW // 2
            pixels = tl.load(x + start + v, mask=(v >= 0) & (v < width) & (j < KW)[None, :], other=0.0)
            total = tl.dot(g.to(tl.float32), pixels.to(tl.float32), total, input_precision="ieee")
    at = ((channel * splits + split) * KH + i[:, None]) * KW + j[None, :]
    tl.store(products + at, total, mask=(i < KH)[:, None] & (j < KW)[None, :])


def forward(call: Work, tile: DirectTile) -> Run:
    """The convolution of images in either layout; with the rotated kernel it is the gradient for x.

    Args:
        call: in float16, bfloat16 or float32.
        tile: how the work is cut.
    """
    (n, c, h, w), (kh, kw), last = call.shape, call.kernel, call.channels_last
    programs = triton.cdiv(h, tile.rows) * triton.cdiv(n * w, tile.samples)
    launch = Launch(
        _forward,
        programs * triton.cdiv(c, tile.channels),
        (n, c, programs, h, w),
        {
            "KH": kh,
            "KW": kw,
            "ROWS": tile.rows,
            "SAMPLES": tile.samples,
            "CHANNELS": tile.channels,
            "LAST": last,
            "ROTATED": call.rotated,
            "HAS_BIAS": call.bias,
            "RELU": call.relu,
            "LONG": n * c * h * w >= 2**31,
            "WIDE": h * w * (c if last else 1) >= 2**31,
        },
        num_warps=tile.warps,
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # neighbouring channels are read together, so their taps must be neighbours, too
        taps = weight.reshape(c, kh * kw).t().contiguous() if last else weight
        y = torch.empty_like(x)
        launch(x, taps, taps if bias is None else bias, y)
        return y

    return run


def weight_gradient(call: Work, tile: DirectTile) -> RunGradient:
    """dw `[C,1,Kh,Kw]` of contiguous images `[N,C,H,W]`; the order of its sums is fixed."""
    (n, c, h, w), (kh, kw), dtype = call.shape, call.kernel, call.dtype
    block_h, block_w, pixels = (
        min(most, max(16, triton.next_power_of_2(size))) for size, most in ((kh, 32), (kw, 32), (w, 64))
    )
    blocks = triton.cdiv(kh, block_h) * triton.cdiv(kw, block_w)
    launch = Launch(
        _products,
        c * tile.splits * blocks,
        (n, c, tile.splits, h, w),
        {
            "KH": kh,
            "KW": kw,
            "BLOCK_H": block_h,
            "BLOCK_W": block_w,
            "PIXELS": pixels,
            "WIDE": h * w >= 2**31,
        },
        num_warps=tile.warps,
    )

    def run(dy: Tensor, x: Tensor) -> Tensor:
        products = x.new_empty((c, tile.splits, kh, kw), dtype=torch.float32)
        launch(x, dy, products)
        return products.sum(1).to(dtype)[:, None]

    return run
