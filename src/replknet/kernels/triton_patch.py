"""Large kernels on tensor cores: products of patches of an image with Toeplitz matrices.

A patch is ROWS x 16 neighbouring pixels; ROWS is 4, or 2 for TF32 and for the gradient for the weights on sm_80. Its
pixels are one dimension of a matrix. A patch of the output is a sum over the row blocks D and the column blocks d that
the kernel reaches:

    y[images, patch j] += x[images, patch (D, j + d)] @ T[D, d]

T[D, d] is a two-level Toeplitz matrix: its element ((a, k), (b, n)) is the tap in row ROWS * D + a - b and column
16 * d + k - n. T is never stored as a whole. A first kernel writes the 16 x 16 Toeplitz matrix of each kernel row and
column block (`triton_strips`). From these, T is loaded with linear addresses.

The gradient for x is the convolution with the rotated kernel. The gradient for the weights sums
x[images, patch]^T @ dy[images, patch] into matrices of the form of T. It then sums along their diagonals, in a fixed
order.

All kernels see contiguous images and sum in float32. Counts and tiles: docs/decisions/0004-gpu-kernels.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_launch import Launch, Number, known, one
from replknet.kernels.triton_plan import (
    SMALL_MAP,
    Geometry,
    PatchTile,
    Run,
    RunGradient,
    Work,
    geometry,
)
from replknet.kernels.triton_strips import Strips

_COLUMNS: tl.constexpr = tl.constexpr(16)  # pixels of a patch along a row
_FLAT = 1024  # elements that a program of a flat kernel works on


@triton.jit(do_not_specialize=["image_units", "programs", "tiles", "height", "units", "has_bias", "zero"])
def _forward(
    x,
    strips,
    bias,
    y,
    image_units,
    channels,
    programs,  # of a channel
    tiles,  # along a row
    height,
    units,  # of a row
    has_bias,
    zero,  # 0, which the compiler does not know
    IMAGE_UNIT: tl.constexpr,  # images
    UNIT: tl.constexpr,  # pixels
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    PATCHES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEIGHTS: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    RELU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NEAR: tl.constexpr,
    LONG: tl.constexpr,  # offsets of images take 64 bits
    WIDE: tl.constexpr,  # a plane has 2^31 elements or more
    AS_FLOAT: tl.constexpr,  # products of float32 copies: the interpreter's bfloat16 products are wrong
):
    REACH: tl.constexpr = KH // 2
    PATCH: tl.constexpr = ROWS * _COLUMNS
    images = image_units * IMAGE_UNIT
    width = units * UNIT
    row_blocks = (height + ROWS - 1) // ROWS
    STRIP_ROW: tl.constexpr = GROUPS * BLOCKS * _COLUMNS * _COLUMNS
    STRIP_ROWS: tl.constexpr = (DEPTH + 1) * ROWS - 1
    channel = tl.program_id(0) // programs
    part = tl.program_id(0) % programs
    left = 0
    if not ONE_TILE:
        left = part % tiles * (PATCHES * _COLUMNS)
        part = part // tiles
    s = tl.arange(0, SAMPLES)
    if BY_IMAGE:
        # samples are neighbouring row blocks of some images; kernel row blocks that meet only padding are left out
        steps = (row_blocks + HEIGHTS - 1) // HEIGHTS
        AT_ONCE: tl.constexpr = SAMPLES // HEIGHTS
        image = part // steps * AT_ONCE + s % AT_ONCE
        start = part % steps * (ROWS * HEIGHTS)
        top = start + s // AT_ONCE * ROWS
        first = tl.maximum(0, (REACH - start - (HEIGHTS - 1) * ROWS) // ROWS)
        last = tl.minimum(DEPTH, (height + REACH - start + ROWS - 1) // ROWS)
    else:
        pair = part * SAMPLES + s
        image = pair // row_blocks
        top = pair % row_blocks * ROWS
        first = 0
        last = DEPTH
    exists = (image < images)[:, None]
    p = tl.arange(0, PATCH)
    row, column = p // _COLUMNS, p % _COLUMNS
    size = tl.full((), width, tl.int64 if LONG else tl.int32) * height
    plane = (image * (size * channels) + channel * size)[:, None]
    strip = strips + channel.to(tl.int64) * (STRIP_ROWS * STRIP_ROW)
    if NEAR:
        # only copies of up to 8 bytes go through the first-level cache; `zero` hides a larger alignment
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
            # with one tile the compiler knows which patches lie outside of the map
            if (
                not ONE_TILE
                or GROUPS > 1
                or (LEFT + _COLUMNS * j > -_COLUMNS and LEFT + _COLUMNS * j < _COLUMNS * PATCHES)
            ):
                w = left + LEFT + (block + j) * _COLUMNS + column[None, :]
                inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
                pixels = tl.load(x + plane + h * width + w, mask=inside, other=0.0)
                if AS_FLOAT:
                    pixels = pixels.to(tl.float32)
                for d in tl.static_range(BLOCKS):
                    if j - d >= 0 and j - d < PATCHES:
                        more = tl.dot(pixels, matrices[d], sums[j - d], input_precision="tf32")
                        sums = sums[: j - d] + (more,) + sums[j - d + 1 :]
    h = top[:, None] + row[None, :]
    if WIDE:
        h = h.to(tl.int64)
    shift = tl.load(bias + channel, mask=has_bias != 0, other=0.0).to(tl.float32)
    for j in tl.static_range(PATCHES):
        w = left + j * _COLUMNS + column[None, :]
        result = sums[j] + shift
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + plane + h * width + w, result.to(y.dtype.element_ty), mask=exists & (h < height) & (w < width))


@triton.jit(
    do_not_specialize=["image_units", "splits", "tiles", "height", "units", "parts", "inverse", "tiles_inverse"]
)
def _products(
    x,
    dy,
    products,  # [C, DEPTH, splits, all blocks, ROWS * ROWS, 32]: sums along the diagonals of 16 x 16 matrices
    image_units,
    channels,
    splits,
    tiles,
    height,
    units,
    parts,  # of a batch, for BY_IMAGE
    inverse,  # of row_blocks, and of tiles: `_inverse`
    tiles_inverse,
    IMAGE_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    PATCHES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BY_IMAGE: tl.constexpr,
    LONG: tl.constexpr,  # as in _forward
    WIDE: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    REACH: tl.constexpr = KH // 2
    PATCH: tl.constexpr = ROWS * _COLUMNS
    images = image_units * IMAGE_UNIT
    width = units * UNIT
    if ONE_TILE:
        tiles = 1
    row_blocks = (height + ROWS - 1) // ROWS
    depth = tl.program_id(0) % DEPTH
    group = tl.program_id(0) // DEPTH % GROUPS
    split = tl.program_id(0) // (DEPTH * GROUPS) % splits
    channel = (tl.program_id(0) // (DEPTH * GROUPS) // splits).to(tl.int64)
    p = tl.arange(0, PATCH)
    row, column = (p // _COLUMNS)[None, :], (p % _COLUMNS)[None, :]
    s = tl.arange(0, SAMPLES)
    size = tl.full((), width, tl.int64 if LONG else tl.int32) * height
    image_size = size * channels
    x += channel * size
    dy += channel * size
    first = 0
    if BY_IMAGE:
        # row blocks whose products with the shifted image are not only padding
        first = tl.maximum(0, (REACH - depth * ROWS) // ROWS)
        last = tl.minimum(row_blocks, (height + REACH - depth * ROWS + ROWS - 1) // ROWS)
        steps = tl.maximum(last - first, 0) * parts * tiles
    else:
        steps = (images * row_blocks + SAMPLES - 1) // SAMPLES * tiles
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums = sums + (tl.zeros((PATCH, PATCH), tl.float32),)
    for step in tl.range(split, steps, splits):
        left = 0
        part = step
        if not ONE_TILE:
            part, tile = _divided(step, tiles, tiles_inverse)
            left = tile * (PATCHES * _COLUMNS)
        if BY_IMAGE:
            image = part % parts * SAMPLES + s
            top = (first + part // parts) * ROWS + row
        else:
            image, block = _divided(part * SAMPLES + s, row_blocks, inverse)
            top = (block * ROWS)[:, None] + row
        exists = (image < images)[:, None]
        plane = (image * image_size)[:, None]
        h = top + (depth * ROWS - REACH)
        if WIDE:
            top = top.to(tl.int64)
            h = h.to(tl.int64)
        gradients = ()
        for j in tl.static_range(PATCHES):
            w = left + j * _COLUMNS + column
            g = tl.load(dy + plane + top * width + w, mask=exists & (top < height) & (w < width), other=0.0)
            if AS_FLOAT:
                g = g.to(tl.float32)
            gradients = gradients + (g,)
        for j in tl.static_range(PATCHES + BLOCKS - 1):
            if (
                not ONE_TILE
                or GROUPS > 1
                or (LEFT + _COLUMNS * j > -_COLUMNS and LEFT + _COLUMNS * j < _COLUMNS * PATCHES)
            ):
                w = left + LEFT + (group * BLOCKS + j) * _COLUMNS + column
                inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
                pixels = tl.load(x + plane + h * width + w, mask=inside, other=0.0)
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
        # ones are exact in TF32; sums split into parts of 11 and 13 bits keep their float32 precision
        high = (m.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        along = tl.dot(high, belongs.to(tl.float32), input_precision="tf32")
        along = tl.dot(m - high, belongs.to(tl.float32), along, input_precision="tf32")
        tl.store(products + (to + d) * (ROWS * ROWS * 32) + ab[:, None] * 32 + diagonal[None, :], along)


@triton.jit
def _divided(a, b, inverse):
    """Quotient and remainder for 0 <= a < 2^31, by a multiplication: a division in a loop takes 20 instructions."""
    quotient = tl.umulhi(tl.cast(a, tl.uint32), tl.cast(inverse, tl.uint32, bitcast=True)).to(tl.int32)
    rest = a - quotient * b
    # the quotient may be one too small
    more = rest >= b
    return tl.where(more, quotient + 1, quotient), tl.where(more, rest - b, rest)


@triton.jit(do_not_specialize=["splits", "programs"])
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
    # a tap has sums in one block d or two: its column is LEFT + 16 d + diagonal - 15 + KW // 2
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


def _as_float(dtype: torch.dtype) -> bool:
    return interpreting() and dtype == torch.bfloat16


def forward(call: Work, tile: PatchTile) -> Run:
    """The convolution of contiguous images; with the rotated kernel it is the gradient for x.

    Args:
        call: in float16, bfloat16, or float32 for TF32 products; every tap meets the map somewhere.
        tile: how the work is cut.
    """
    (n, c, h, w), (kh, kw) = call.shape, call.kernel
    g = geometry(h, w, kh, kw, tile)
    strips = Strips(call, tile, g)
    if tile.by_image:
        programs = g.tiles * triton.cdiv(g.row_blocks, tile.heights) * triton.cdiv(n, tile.samples // tile.heights)
    else:
        programs = g.tiles * triton.cdiv(n * g.row_blocks, tile.samples)
    (image_units, *numbers), constants = _sizes(call, tile, g)
    launch = Launch(
        _forward,
        programs * c,
        (image_units, c, programs if tile.any_size else one(programs), *numbers, int(call.bias), 0),
        {
            **constants,
            "KH": kh,
            "ROWS": tile.rows,
            "DEPTH": g.depth,
            "GROUPS": g.groups,
            "BLOCKS": g.blocks,
            "LEFT": g.left,
            "PATCHES": g.patches,
            "SAMPLES": tile.samples,
            "HEIGHTS": tile.heights,
            "BY_IMAGE": tile.by_image,
            "RELU": call.relu,
            "TRANSPOSED": call.dtype == torch.float32,
            "NEAR": tile.near,
            "AS_FLOAT": _as_float(call.dtype),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = strips.of(weight)
        y = torch.empty_like(x)
        launch(x, made, made if bias is None else bias, y)
        return y

    return run


def weight_gradient(call: Work, tile: PatchTile) -> RunGradient:
    """dw `[C,1,Kh,Kw]` of contiguous images; the order of its sums is fixed."""
    (n, c, h, w), (kh, kw), dtype = call.shape, call.kernel, call.dtype
    g = geometry(h, w, kh, kw, tile)
    blocks = g.groups * g.blocks
    (image_units, *numbers), constants = _sizes(call, tile, g)
    form = {"KH": kh, "ROWS": tile.rows, "DEPTH": g.depth, "LEFT": g.left}
    multiply = Launch(
        _products,
        c * tile.splits * g.depth * g.groups,
        (
            image_units,
            c,
            one(tile.splits),
            *numbers,
            _parts(n, tile),
            _inverse(g.row_blocks),
            _inverse(g.tiles),
        ),
        {
            **constants,
            **form,
            "GROUPS": g.groups,
            "BLOCKS": g.blocks,
            "PATCHES": g.patches,
            "SAMPLES": tile.samples,
            "BY_IMAGE": tile.by_image,
            "AS_FLOAT": _as_float(dtype),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    flat = min(_FLAT, triton.next_power_of_2(kh * kw))
    programs = triton.cdiv(kh * kw, flat)
    add = Launch(_taps, programs * c, (tile.splits, programs), {**form, "KW": kw, "BLOCKS": blocks, "FLAT": flat})
    elements = c * g.depth * tile.splits * blocks * tile.rows**2 * 32

    def run(dy: Tensor, x: Tensor) -> Tensor:
        products = x.new_empty(elements, dtype=torch.float32)
        multiply(x, dy, products)
        dw = x.new_empty((c, 1, kh, kw))
        add(products, dw)
        return dw

    return run


def _parts(n: int, tile: PatchTile) -> Number:
    """Parts of a batch; each has as many images as a product has rows."""
    if not tile.by_image:
        return known(1)
    parts = triton.cdiv(n, tile.samples)
    return parts if tile.any_size else one(parts)


def _inverse(number: int) -> int:
    """2^32 / number, rounded down, at most 2^32 - 1, as the bits of a signed 32-bit number; for `_divided`."""
    found = min((1 << 32) // number, (1 << 32) - 1)
    return found - (1 << 32) if found >= 1 << 31 else found


def _sizes(call: Work, tile: PatchTile, g: Geometry) -> tuple[tuple[Number, ...], dict[str, object]]:
    """The sizes of a batch as numbers and as constants of a kernel.

    The compiler knows the sides of a small map, which gives shorter addresses. Of other maps it knows only a factor of
    the width, and the number of patches along a row up to the width of a tile. So one compiled kernel serves many
    sizes. Where rows of products are images, it knows whether their number is a multiple of 16.
    """
    n, c, h, w = call.shape
    small = max(h, w) <= SMALL_MAP and not tile.any_size
    unit = next(unit for unit in (8, 4, 2, 1) if w % unit == 0)
    images = 16 if tile.by_image and n % 16 == 0 else 1
    sides = tuple(known(number) if small else number for number in (h, w // unit))
    return (n // images, g.tiles, *sides), {
        "IMAGE_UNIT": images,
        "UNIT": unit,
        "ONE_TILE": g.tiles == 1 and not tile.any_size,
        # not by image, the gradient computes offsets in every step: 32 bits where they suffice
        "LONG": tile.by_image or n * c * h * w >= 2**31,
        "WIDE": h * w >= 2**31,
    }
