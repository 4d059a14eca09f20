"""Sums of products in float32 on a GPU's ordinary arithmetic: exact float32, and small kernels of any type.

Forward, a program works on ROWS output rows at some samples (positions of a row, of one or more images) and channels.
Each input row is loaded once for all output rows that see it, so there are ROWS multiplications for each load. Both
layouts are read as they are. The gradient for x is the same with the kernel rotated.

The gradient for the weights sums, for each image and row of x, dy[rows of the kernel, w] @ X[w, columns of the kernel]
where X[w, j] = x[w + j - Kw // 2], a matrix product in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_plan import DirectTile


@triton.jit
def _forward(
    x,
    taps,  # [C, KH, KW], or [KH, KW, C] for channels_last
    bias,
    y,
    images,
    channels,
    programs,  # of a block of channels
    tap_channel,  # elements from a tap to that of the next channel, and to the next tap of a channel
    tap_next,
    H: tl.constexpr,
    W: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,  # channels_last
    ROTATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # an image has 2^31 elements or more
):
    ROW_BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    block = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    top = part % ROW_BLOCKS * ROWS
    position = part // ROW_BLOCKS * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    image, column = (position // W).to(tl.int64), position % W
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = (image < images) & (channel < channels)
    if WIDE:
        column, channel, top = column.to(tl.int64), channel.to(tl.int64), top.to(tl.int64)
    if LAST:
        start = image * H * W * channels + channel
        pixel = channels
    else:
        start = (image * channels + channel) * H * W
        pixel = 1
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((SAMPLES, CHANNELS), tl.float32),)
    tap = taps + channel * tap_channel
    # rows of the image, relative to the first that the kernel reaches
    first = tl.maximum(0, KH // 2 - top)
    last = tl.minimum(ROWS + KH - 1, H + KH // 2 - top)
    for j in tl.range(max(0, KW // 2 - W + 1), min(KW, W + KW // 2)):
        w = column + (j - KW // 2)
        inside = exists & (w >= 0) & (w < W)
        for i in tl.range(first, last):
            pixels = tl.load(x + start + ((top + i - KH // 2) * W + w) * pixel, mask=inside, other=0.0).to(tl.float32)
            for r in tl.static_range(ROWS):
                row = i - r
                at = (KH - 1 - row) * KW + KW - 1 - j if ROTATED else row * KW + j
                has_tap = (channel < channels) & (row >= 0) & (row < KH)
                factor = tl.load(tap + at * tap_next, mask=has_tap, other=0.0).to(tl.float32)
                sums = sums[:r] + (sums[r] + pixels * factor,) + sums[r + 1 :]
    for r in tl.static_range(ROWS):
        result = sums[r]
        if HAS_BIAS:
            result += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        to = y + start + ((top + r) * W + column) * pixel
        tl.store(to, result.to(y.dtype.element_ty), mask=exists & (top + r < H))


@triton.jit
def _products(
    x,
    dy,
    products,  # [C, splits, KH, KW]
    images,
    channels,
    splits,
    H: tl.constexpr,
    W: tl.constexpr,
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
    for step in tl.range(split, images * H, splits):
        plane = (step // H * channels + channel) * H * W
        row = step % H
        start = plane + tl.full((), row, tl.int64) * W
        # the row of dy whose products with this row of x belong to the taps' row i
        h = row - i + KH // 2
        if WIDE:
            h = h.to(tl.int64)
        for left in tl.range(0, W, PIXELS):
            w = left + p
            is_row = (h >= 0) & (h < H) & (i < KH)
            g = tl.load(dy + plane + (h * W)[:, None] + w[None, :], mask=is_row[:, None] & (w < W)[None, :], other=0.0)
            v = w[:, None] + j[None, :] - KW // 2
            pixels = tl.load(x + start + v, mask=(v >= 0) & (v < W) & (j < KW)[None, :], other=0.0)
            total = tl.dot(g.to(tl.float32), pixels.to(tl.float32), total, input_precision="ieee")
    at = ((channel * splits + split) * KH + i[:, None]) * KW + j[None, :]
    tl.store(products + at, total, mask=(i < KH)[:, None] & (j < KW)[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, tile: DirectTile, rotated: bool = False
) -> Tensor:
    """The convolution of images in either layout; with the kernel rotated it is the gradient for x.

    Args:
        x: `[N,C,H,W]`, contiguous or channels_last, float16, bfloat16 or float32.
        weight: `[C,1,Kh,Kw]`, dtype of `x`.
        bias: `[C]` or None.
    """
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    last = not x.is_contiguous()
    # neighbouring channels are read together, so their taps must be neighbours, too
    taps = weight.reshape(c, kh * kw).t().contiguous() if last else weight
    y = torch.empty_like(x)
    programs = triton.cdiv(h, tile.rows) * triton.cdiv(n * w, tile.samples)
    _forward[(programs * triton.cdiv(c, tile.channels),)](
        x,
        taps,
        taps if bias is None else bias,
        y,
        n,
        c,
        programs,
        1 if last else kh * kw,
        c if last else 1,
        H=h,
        W=w,
        KH=kh,
        KW=kw,
        ROWS=tile.rows,
        SAMPLES=tile.samples,
        CHANNELS=tile.channels,
        LAST=last,
        ROTATED=rotated,
        HAS_BIAS=bias is not None,
        RELU=relu,
        WIDE=h * w * (c if last else 1) >= 2**31,
        num_warps=tile.warps,
    )
    return y


def weight_gradient(dy: Tensor, x: Tensor, kh: int, kw: int, tile: DirectTile) -> Tensor:
    """dw `[C,1,Kh,Kw]` of contiguous images `[N,C,H,W]`; the order of its sums is fixed."""
    n, c, h, w = x.shape
    block_h, block_w, pixels = (
        min(most, max(16, triton.next_power_of_2(size))) for size, most in ((kh, 32), (kw, 32), (w, 64))
    )
    products = torch.empty((c, tile.splits, kh, kw), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(kh, block_h) * triton.cdiv(kw, block_w)
    _products[(c * tile.splits * blocks,)](
        x,
        dy,
        products,
        n,
        c,
        tile.splits,
        H=h,
        W=w,
        KH=kh,
        KW=kw,
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        PIXELS=pixels,
        WIDE=h * w >= 2**31,
        num_warps=tile.warps,
    )
    return products.sum(1).to(x.dtype)[:, None]
