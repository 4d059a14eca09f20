"""Large kernels on tensor cores: products of patches of an image with Toeplitz matrices.

A patch is ROWS x 16 neighbouring pixels (ROWS is 4, or 2 for TF32), seen as one dimension of a matrix. With the same
dimension for the output, a patch of it is a sum over the row blocks D and the column blocks d that the kernel reaches:

    y[images, patch j] += x[images, patch (D, j + d)] @ T[D, d]

T[D, d] is a two-level Toeplitz matrix: its element ((a, k), (b, n)) is the tap in row ROWS * D + a - b and column
16 * d + k - n. It is never stored as a whole. A first kernel writes the 16 x 16 Toeplitz matrix of each kernel row and
column block (the strips, zero outside of the kernel), from which T is a load with linear addresses. The gradient for x
is the same with the rotated kernel. The gradient for the weights sums x[images, patch]^T @ dy[images, patch] into
matrices of the form of T, and then along their diagonals, in a fixed order.

All kernels see contiguous images and sum in float32. Counts and tiles: docs/decisions/0004-gpu-kernels.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_plan import PatchTile, geometry

_COLUMNS: tl.constexpr = tl.constexpr(16)  # pixels of a patch along a row
_FLAT = 1024  # elements that a program of a flat kernel works on


@triton.jit
def _strips(
    weight,  # [C, KH, KW]
    strips,  # [C, strip rows, blocks, 16, 16]
    elements,  # of strips, a channel
    programs,  # of a channel
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    ROTATED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLAT: tl.constexpr,
):
    channel = (tl.program_id(0) // programs).to(tl.int64)
    e = tl.program_id(0) % programs * FLAT + tl.arange(0, FLAT)
    n, k = e % _COLUMNS, e // _COLUMNS % _COLUMNS
    if TRANSPOSED:
        n, k = k, n
    row = e // (_COLUMNS * _COLUMNS * BLOCKS) - (ROWS - 1)
    column = LEFT + e // (_COLUMNS * _COLUMNS) % BLOCKS * _COLUMNS + k - n + KW // 2
    inside = (row >= 0) & (row < KH) & (column >= 0) & (column < KW)
    if ROTATED:
        row, column = KH - 1 - row, KW - 1 - column
    tap = tl.load(weight + channel * (KH * KW) + row * KW + column, mask=inside, other=0.0)
    tl.store(strips + channel * elements + e, tap, mask=e < elements)


@triton.jit(do_not_specialize=["zero"])
def _forward(
    x,
    strips,
    bias,
    y,
    images,
    channels,
    programs,  # of a channel
    zero,  # 0, of which nothing is known when this is compiled
    H: tl.constexpr,
    W: tl.constexpr,
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    PATCHES: tl.constexpr,
    TILES: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEIGHTS: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NEAR: tl.constexpr,
    WIDE: tl.constexpr,  # a plane has 2^31 elements or more
    AS_FLOAT: tl.constexpr,  # products of float32 copies: the interpreter's bfloat16 products are wrong
):
    REACH: tl.constexpr = KH // 2
    PATCH: tl.constexpr = ROWS * _COLUMNS
    ROW_BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    STRIP_ROW: tl.constexpr = GROUPS * BLOCKS * _COLUMNS * _COLUMNS
    STRIP_ROWS: tl.constexpr = (DEPTH + 1) * ROWS - 1
    channel = tl.program_id(0) // programs
    tile = tl.program_id(0) % programs % TILES
    part = tl.program_id(0) % programs // TILES
    s = tl.arange(0, SAMPLES)
    if BY_IMAGE:
        # neighbouring row blocks of some images; the kernel's row blocks that only see padding are left out
        STEPS: tl.constexpr = (ROW_BLOCKS + HEIGHTS - 1) // HEIGHTS
        AT_ONCE: tl.constexpr = SAMPLES // HEIGHTS
        image = part // STEPS * AT_ONCE + s % AT_ONCE
        start = part % STEPS * (ROWS * HEIGHTS)
        top = start + s // AT_ONCE * ROWS
        first = tl.maximum(0, (REACH - start - (HEIGHTS - 1) * ROWS) // ROWS)
        last = tl.minimum(DEPTH, (H + REACH - start + ROWS - 1) // ROWS)
    else:
        pair = part * SAMPLES + s
        image = pair // ROW_BLOCKS
        top = pair % ROW_BLOCKS * ROWS
        first = 0
        last = DEPTH
    exists = (image < images)[:, None]
    p = tl.arange(0, PATCH)
    row, column = p // _COLUMNS, p % _COLUMNS
    left = tile * (PATCHES * _COLUMNS)
    plane = ((image.to(tl.int64) * channels + channel) * H * W)[:, None]
    strip = strips + channel.to(tl.int64) * (STRIP_ROWS * STRIP_ROW)
    if NEAR:
        # only copies of up to 8 bytes go through the first-level cache, so no larger alignment is to be provable
        strip += zero * 4
    if TRANSPOSED:
        toeplitz = (row[None, :] - row[:, None] + ROWS - 1) * STRIP_ROW + column[:, None] * _COLUMNS + column[None, :]
    else:
        toeplitz = (row[:, None] - row[None, :] + ROWS - 1) * STRIP_ROW + column[:, None] * _COLUMNS + column[None, :]
    sums = ()
    for _ in tl.static_range(PATCHES):
        sums = sums + (tl.zeros((SAMPLES, PATCH), tl.float32),)
    for step in tl.range(first * GROUPS, last * GROUPS):
        depth = step // GROUPS
        block = step % GROUPS * BLOCKS
        matrices = ()
        for d in tl.static_range(BLOCKS):
            t = tl.load(strip + depth * (ROWS * STRIP_ROW) + (block + d) * (_COLUMNS * _COLUMNS) + toeplitz)
            if TRANSPOSED:
                t = tl.trans(t)
            if AS_FLOAT:
                t = t.to(tl.float32)
            matrices = matrices + (t,)
        h = top[:, None] + (depth * ROWS - REACH) + row[None, :]
        if WIDE:
            h = h.to(tl.int64)
        for j in tl.static_range(PATCHES + BLOCKS - 1):
            # a map of one tile: what lies outside of it is known when this is compiled
            if TILES > 1 or GROUPS > 1 or (LEFT + _COLUMNS * j > -_COLUMNS and LEFT + _COLUMNS * j < W):
                w = left + LEFT + (block + j) * _COLUMNS + column[None, :]
                inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                pixels = tl.load(x + plane + h * W + w, mask=inside, other=0.0)
                if AS_FLOAT:
                    pixels = pixels.to(tl.float32)
                for d in tl.static_range(BLOCKS):
                    if j - d >= 0 and j - d < PATCHES:
                        more = tl.dot(pixels, matrices[d], sums[j - d], input_precision="tf32")
                        sums = sums[: j - d] + (more,) + sums[j - d + 1 :]
    h = top[:, None] + row[None, :]
    if WIDE:
        h = h.to(tl.int64)
    for j in tl.static_range(PATCHES):
        w = left + j * _COLUMNS + column[None, :]
        result = sums[j]
        if HAS_BIAS:
            result += tl.load(bias + channel).to(tl.float32)
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + plane + h * W + w, result.to(y.dtype.element_ty), mask=exists & (h < H) & (w < W))


@triton.jit
def _products(
    x,
    dy,
    products,  # [C, DEPTH, splits, all blocks, ROWS * ROWS, 32]: sums along the diagonals of 16 x 16 matrices
    images,
    channels,
    splits,
    H: tl.constexpr,
    W: tl.constexpr,
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    PATCHES: tl.constexpr,
    TILES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    WIDE: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    REACH: tl.constexpr = KH // 2
    PATCH: tl.constexpr = ROWS * _COLUMNS
    ROW_BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    depth = tl.program_id(0) % DEPTH
    group = tl.program_id(0) // DEPTH % GROUPS
    split = tl.program_id(0) // (DEPTH * GROUPS) % splits
    channel = (tl.program_id(0) // (DEPTH * GROUPS) // splits).to(tl.int64)
    p = tl.arange(0, PATCH)
    row, column = (p // _COLUMNS)[None, :], (p % _COLUMNS)[None, :]
    s = tl.arange(0, SAMPLES)
    first = 0
    if BY_IMAGE:
        # row blocks whose products with the shifted image are not all padding
        first = tl.maximum(0, (REACH - depth * ROWS) // ROWS)
        last = tl.minimum(ROW_BLOCKS, (H + REACH - depth * ROWS + ROWS - 1) // ROWS)
        parts = (images + SAMPLES - 1) // SAMPLES
        steps = tl.maximum(last - first, 0) * parts * TILES
    else:
        parts = 1
        steps = (images * ROW_BLOCKS + SAMPLES - 1) // SAMPLES * TILES
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums = sums + (tl.zeros((PATCH, PATCH), tl.float32),)
    for step in tl.range(split, steps, splits):
        left = step % TILES * (PATCHES * _COLUMNS)
        part = step // TILES
        if BY_IMAGE:
            image = part % parts * SAMPLES + s
            top = (first + part // parts) * ROWS + row
        else:
            pair = part * SAMPLES + s
            image = pair // ROW_BLOCKS
            top = (pair % ROW_BLOCKS * ROWS)[:, None] + row
        exists = (image < images)[:, None]
        plane = ((image.to(tl.int64) * channels + channel) * H * W)[:, None]
        h = top + (depth * ROWS - REACH)
        if WIDE:
            top = top.to(tl.int64)
            h = h.to(tl.int64)
        gradients = ()
        for j in tl.static_range(PATCHES):
            w = left + j * _COLUMNS + column
            g = tl.load(dy + plane + top * W + w, mask=exists & (top < H) & (w < W), other=0.0)
            if AS_FLOAT:
                g = g.to(tl.float32)
            gradients = gradients + (g,)
        for j in tl.static_range(PATCHES + BLOCKS - 1):
            if TILES > 1 or GROUPS > 1 or (LEFT + _COLUMNS * j > -_COLUMNS and LEFT + _COLUMNS * j < W):
                w = left + LEFT + (group * BLOCKS + j) * _COLUMNS + column
                inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                pixels = tl.load(x + plane + h * W + w, mask=inside, other=0.0)
                if AS_FLOAT:
                    pixels = pixels.to(tl.float32)
                for d in tl.static_range(BLOCKS):
                    if j - d >= 0 and j - d < PATCHES:
                        more = tl.dot(tl.trans(pixels), gradients[j - d], sums[d], input_precision="tf32")
                        sums = sums[:d] + (more,) + sums[d + 1 :]
    # element (k, n) of a 16 x 16 matrix belongs to the diagonal k - n + 15
    e = tl.arange(0, 256)
    diagonal = tl.arange(0, 32)
    belongs = (e // _COLUMNS - e % _COLUMNS + 15)[:, None] == diagonal[None, :]
    ab = tl.arange(0, ROWS * ROWS)
    to = ((channel * DEPTH + depth) * splits + split) * (GROUPS * BLOCKS) + group * BLOCKS
    for d in tl.static_range(BLOCKS):
        m = tl.reshape(sums[d], (ROWS, 16, ROWS, 16))
        m = tl.reshape(tl.permute(m, (0, 2, 1, 3)), (ROWS * ROWS, 256))
        # ones are exact in TF32; two parts of 11 bits and 13 bits keep the sums' float32 precision
        high = (m.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        along = tl.dot(high, belongs.to(tl.float32), input_precision="tf32")
        along = tl.dot(m - high, belongs.to(tl.float32), along, input_precision="tf32")
        tl.store(products + (to + d) * (ROWS * ROWS * 32) + ab[:, None] * 32 + diagonal[None, :], along)


@triton.jit
def _taps(
    products,  # as _products writes them
    dw,  # [C, KH, KW]
    splits,
    programs,  # of a channel
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,  # of all groups
    LEFT: tl.constexpr,
    FLAT: tl.constexpr,
):
    channel = (tl.program_id(0) // programs).to(tl.int64)
    tap = tl.program_id(0) % programs * FLAT + tl.arange(0, FLAT)
    exists = tap < KH * KW
    row = tap // KW
    # the tap's column is LEFT + 16 d + diagonal - 15 + KW // 2, for one block or two
    column = tap % KW - LEFT - KW // 2 + 15
    total = tl.zeros((FLAT,), tl.float32)
    for split in range(splits):
        for b in tl.static_range(ROWS):
            depth = (row + b) // ROWS
            ab = (row + b) % ROWS * ROWS + b
            for before in tl.static_range(2):
                d = column // 16 - before
                at = ((channel * DEPTH + depth) * splits + split) * BLOCKS + d
                from_ = products + at * (ROWS * ROWS * 32) + ab * 32 + column % 16 + 16 * before
                total += tl.load(from_, mask=exists & (d >= 0) & (d < BLOCKS), other=0.0)
    tl.store(dw + channel * (KH * KW) + tap, total.to(dw.dtype.element_ty), mask=exists)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, on a CPU."""
    return not isinstance(_forward, triton.runtime.JITFunction)


def _as_float(x: Tensor) -> bool:
    return interpreting() and x.dtype == torch.bfloat16


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, tile: PatchTile, rotated: bool = False
) -> Tensor:
    """The convolution of contiguous images; with the kernel rotated it is the gradient for x.

    Args:
        x: `[N,C,H,W]`, float16, bfloat16, or float32 for TF32 products.
        weight: `[C,1,Kh,Kw]`, dtype of `x`, no tap of which only ever meets padding.
        bias: `[C]` or None.
    """
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    g = geometry(h, w, kh, kw, tile)
    transposed = x.dtype == torch.float32
    strips = torch.empty(c * g.strip_elements, dtype=x.dtype, device=x.device)
    flat_programs = triton.cdiv(g.strip_elements, _FLAT)
    _strips[(flat_programs * c,)](
        weight,
        strips,
        g.strip_elements,
        flat_programs,
        KH=kh,
        KW=kw,
        ROWS=tile.rows,
        BLOCKS=g.groups * g.blocks,
        LEFT=g.left,
        ROTATED=rotated,
        TRANSPOSED=transposed,
        FLAT=_FLAT,
    )
    y = torch.empty_like(x)
    if tile.by_image:
        programs = g.tiles * triton.cdiv(g.row_blocks, tile.heights) * triton.cdiv(n, tile.samples // tile.heights)
    else:
        programs = g.tiles * triton.cdiv(n * g.row_blocks, tile.samples)
    _forward[(programs * c,)](
        x,
        strips,
        strips if bias is None else bias,
        y,
        n,
        c,
        programs,
        0,
        H=h,
        W=w,
        KH=kh,
        ROWS=tile.rows,
        DEPTH=g.depth,
        GROUPS=g.groups,
        BLOCKS=g.blocks,
        LEFT=g.left,
        PATCHES=g.patches,
        TILES=g.tiles,
        SAMPLES=tile.samples,
        HEIGHTS=tile.heights,
        BY_IMAGE=tile.by_image,
        HAS_BIAS=bias is not None,
        RELU=relu,
        TRANSPOSED=transposed,
        NEAR=tile.near,
        WIDE=h * w >= 2**31,
        AS_FLOAT=_as_float(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    return y


def weight_gradient(dy: Tensor, x: Tensor, kh: int, kw: int, tile: PatchTile) -> Tensor:
    """dw `[C,1,Kh,Kw]` of contiguous images `[N,C,H,W]`; the order of its sums is fixed."""
    n, c, h, w = x.shape
    g = geometry(h, w, kh, kw, tile)
    blocks = g.groups * g.blocks
    products = torch.empty((c, g.depth, tile.splits, blocks, tile.rows**2, 32), dtype=torch.float32, device=x.device)
    _products[(c * tile.splits * g.depth * g.groups,)](
        x,
        dy,
        products,
        n,
        c,
        tile.splits,
        H=h,
        W=w,
        KH=kh,
        ROWS=tile.rows,
        DEPTH=g.depth,
        GROUPS=g.groups,
        BLOCKS=g.blocks,
        LEFT=g.left,
        PATCHES=g.patches,
        TILES=g.tiles,
        SAMPLES=tile.samples,
        BY_IMAGE=tile.by_image,
        WIDE=h * w >= 2**31,
        AS_FLOAT=_as_float(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    dw = torch.empty((c, 1, kh, kw), dtype=x.dtype, device=x.device)
    flat = min(_FLAT, triton.next_power_of_2(kh * kw))
    flat_programs = triton.cdiv(kh * kw, flat)
    _taps[(flat_programs * c,)](
        products,
        dw,
        tile.splits,
        flat_programs,
        KH=kh,
        KW=kw,
        ROWS=tile.rows,
        DEPTH=g.depth,
        BLOCKS=blocks,
        LEFT=g.left,
        FLAT=flat,
    )
    return dw
