"""Large kernels on small maps: a program holds whole maps of some images, and each pixel is read once.

For maps of at most 16 x 16 pixels in 16-bit types there are two forms, in the words of `triton_patch`:

- By patches: a program loads all patches of 4 x 16 pixels of its maps. For each distance D of row blocks it loads one
  Toeplitz matrix T[D] from the strips. It adds x[images, patch b + D] @ T[D] to every patch b of the output.
- Flat: a map of at most about 56 pixels is one row of a matrix. It lies in a window of 64 elements, which starts at a
  multiple of 16 bytes. One product with the matrix of all taps, gathered from the weight, gives the output.

A window has elements of other maps, too. They are set to zero, so that an infinity stays in its own map. Sums are in
float32. The gradient for x is the convolution with the rotated kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels.triton_launch import Launch, one
from replknet.kernels.triton_patch import interpreting
from replknet.kernels.triton_plan import SMALL_MAP, PlaneTile, Run, Work, in_one_window, plane_geometry
from replknet.kernels.triton_strips import Strips

_COLUMNS: tl.constexpr = tl.constexpr(16)  # pixels of a patch along a row
_WINDOW: tl.constexpr = tl.constexpr(64)  # elements
_UNIT = 8  # elements of 16 bytes
_ROWS = 4  # of a patch


@triton.jit(do_not_specialize=["images", "channels", "programs"])
def _by_patches(
    x,
    strips,  # [C, STRIP_ROWS, 16, 16]
    bias,
    y,
    images,
    channels,
    programs,  # of a channel
    H: tl.constexpr,
    W: tl.constexpr,
    FULL: tl.constexpr,  # the images are a multiple of SAMPLES
    LONG: tl.constexpr,  # offsets take 64 bits
    KH: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    AS_FLOAT: tl.constexpr,  # as in triton_patch
):
    PATCHES: tl.constexpr = (H + ROWS - 1) // ROWS
    # row blocks between an output and the farthest pixels that the kernel reaches
    FARTHEST: tl.constexpr = min(PATCHES - 1, (KH // 2 + ROWS - 1) // ROWS)
    channel = tl.program_id(0) // programs
    image = tl.program_id(0) % programs * SAMPLES + tl.arange(0, SAMPLES)
    exists = (image < images)[:, None] | FULL
    p = tl.arange(0, ROWS * _COLUMNS)
    row, column = p // _COLUMNS, p % _COLUMNS
    if LONG:
        image = image.to(tl.int64)
    plane = ((image * channels + channel) * (H * W))[:, None]
    pixel = (row * W + column)[None, :]
    patches = ()
    sums = ()
    for a in tl.static_range(PATCHES):
        inside = exists & ((row < H - a * ROWS) & (column < W))[None, :]
        pixels = tl.load(x + plane + (a * ROWS * W + pixel), mask=inside, other=0.0)
        if AS_FLOAT:
            pixels = pixels.to(tl.float32)
        patches = patches + (pixels,)
        sums = sums + (tl.zeros((SAMPLES, ROWS * _COLUMNS), tl.float32),)
    strips += channel.to(tl.int64) * (STRIP_ROWS * _COLUMNS * _COLUMNS)
    # each matrix is loaded while the one before it is multiplied
    following = _toeplitz(strips, -FARTHEST, KH, ROWS, STRIP_ROWS)
    for distance in tl.static_range(-FARTHEST, FARTHEST + 1):
        matrix = following
        if distance < FARTHEST:
            following = _toeplitz(strips, distance + 1, KH, ROWS, STRIP_ROWS)
        if AS_FLOAT:
            matrix = matrix.to(tl.float32)
        for b in tl.static_range(PATCHES):
            if b + distance >= 0 and b + distance < PATCHES:
                more = tl.dot(patches[b + distance], matrix, sums[b])
                sums = sums[:b] + (more,) + sums[b + 1 :]
    for b in tl.static_range(PATCHES):
        inside = exists & ((row < H - b * ROWS) & (column < W))[None, :]
        result = _finished(sums[b], bias + channel, y.dtype.element_ty, HAS_BIAS, RELU)
        tl.store(y + plane + (b * ROWS * W + pixel), result, mask=inside)


@triton.jit
def _toeplitz(strips, distance: tl.constexpr, KH: tl.constexpr, ROWS: tl.constexpr, STRIP_ROWS: tl.constexpr):
    p = tl.arange(0, ROWS * _COLUMNS)
    row, column = p // _COLUMNS, p % _COLUMNS
    FIRST: tl.constexpr = distance * ROWS + KH // 2
    r = row[:, None] - row[None, :] + (FIRST + ROWS - 1)
    # the first strip and the last strip lie outside of the kernel: they are zero
    if FIRST < 0:
        r = tl.maximum(r, 0)
    if FIRST + 2 * (ROWS - 1) >= STRIP_ROWS:
        r = tl.minimum(r, STRIP_ROWS - 1)
    return tl.load(strips + r * (_COLUMNS * _COLUMNS) + column[:, None] * _COLUMNS + column[None, :])


@triton.jit
def _finished(sums, bias, dtype: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    if HAS_BIAS:
        sums += tl.load(bias).to(tl.float32)
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return sums.to(dtype)


@triton.jit(do_not_specialize=["images", "channels", "programs"])
def _flat(
    x,
    weight,  # [C, KH, KW]
    bias,
    y,
    images,
    channels,
    programs,  # of a channel
    H: tl.constexpr,
    W: tl.constexpr,
    FULL: tl.constexpr,  # as in _by_patches
    LONG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UNIT: tl.constexpr,  # elements; C * H * W is a multiple of it
    SAMPLES: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    PIXELS: tl.constexpr = H * W
    channel = tl.program_id(0) // programs
    image = tl.program_id(0) % programs * SAMPLES + tl.arange(0, SAMPLES)
    p = tl.arange(0, _WINDOW)
    shift = 0
    if PIXELS % UNIT != 0:
        shift = channel * PIXELS % UNIT
    inside = (p >= shift) & (p < shift + PIXELS)
    exists = (image < images)[:, None] | FULL
    if LONG:
        image = image.to(tl.int64)
    at = (image * (channels * PIXELS // UNIT) + channel * PIXELS // UNIT)[:, None] * UNIT + p[None, :]
    touched = p // UNIT <= (shift + PIXELS - 1) // UNIT
    pixels = tl.load(x + at, mask=exists & touched[None, :], other=0.0)
    # elements outside of the map are zero or not stored, so any tap will do for them
    inner = tl.minimum(tl.maximum(p - shift, 0), PIXELS - 1)
    row, column = inner // W, inner % W
    tap = row * KW + column
    if ROTATED:
        tap = -tap
    taps = weight + channel.to(tl.int64) * (KH * KW) + tap[:, None] + (KH // 2 * KW + KW // 2 - tap)[None, :]
    if KH >= 2 * H - 1 and KW >= 2 * W - 1:
        matrix = tl.load(taps)
    else:
        # as unsigned numbers, negative ones are large
        down = (row[:, None] - row[None, :] + KH // 2).to(tl.uint32)
        across = (column[:, None] - column[None, :] + KW // 2).to(tl.uint32)
        matrix = tl.load(taps, mask=(down < KH) & (across < KW), other=0.0)
    pixels = tl.where(inside[None, :], pixels, 0.0)
    if AS_FLOAT:
        pixels = pixels.to(tl.float32)
        matrix = matrix.to(tl.float32)
    result = _finished(tl.dot(pixels, matrix), bias + channel, y.dtype.element_ty, HAS_BIAS, RELU)
    if PIXELS % UNIT != 0:
        # whole units are stored at once; the other units have elements of two maps
        first = p // UNIT * UNIT
        whole = (first >= shift) & (first + UNIT <= shift + PIXELS)
        tl.store(y + at, result, mask=exists & whole[None, :])
        tl.store(y + at, result, mask=exists & (inside & (whole == 0))[None, :])
    else:
        tl.store(y + at, result, mask=exists & inside[None, :])


def forward(work: Work, tile: PlaneTile) -> Run:
    """The convolution of contiguous images; with the rotated kernel it is the gradient for x.

    Args:
        work: in float16 or bfloat16; every tap meets the map somewhere.
        tile: how the work is cut.

    Raises:
        ValueError: these kernels do not take the maps, their layout or dtype, or the tile.
    """
    n, c, h, w = work.shape
    if work.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"plane kernels take float16 and bfloat16, got {str(work.dtype).removeprefix('torch.')}")
    if work.channels_last:
        raise ValueError("plane kernels take contiguous images, got channels_last: copy them first")
    common: dict[str, object] = {
        "H": h,
        "W": w,
        "FULL": n % tile.samples == 0,
        "LONG": n * c * h * w >= 2**31,
        "SAMPLES": tile.samples,
        "HAS_BIAS": work.bias,
        "RELU": work.relu,
        "AS_FLOAT": interpreting() and work.dtype == torch.bfloat16,
    }
    if tile.rows == 0:
        return _flat_forward(work, tile, common)
    if tile.rows != _ROWS:
        raise ValueError(f"a patch of the plane kernels has {_ROWS} rows, or 0 for flat maps, got {tile.rows}")
    if max(h, w) > SMALL_MAP:
        raise ValueError(f"plane kernels take maps of up to {SMALL_MAP}x{SMALL_MAP} pixels, got {h}x{w}")
    kh, kw = work.kernel
    g = plane_geometry(h, w, kh, kw)
    strips = Strips(work, tile, g)
    programs = triton.cdiv(n, tile.samples)
    launch = Launch(
        _by_patches,
        c * programs,
        (n, c, one(programs)),
        {**common, "KH": kh, "ROWS": tile.rows, "STRIP_ROWS": g.strip_rows},
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


def _flat_forward(work: Work, tile: PlaneTile, common: dict[str, object]) -> Run:
    (n, c, h, w), (kh, kw) = work.shape, work.kernel
    if not in_one_window(h, w):
        raise ValueError(f"flat plane kernels take maps that fit a window of {_WINDOW.value} elements, got {h}x{w}")
    programs = triton.cdiv(n, tile.samples)
    launch = Launch(
        _flat,
        c * programs,
        (n, c, one(programs)),
        {
            **common,
            "KH": kh,
            "KW": kw,
            "UNIT": 1 if c * h * w % _UNIT else _UNIT,
            "ROTATED": work.rotated,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        launch(x, weight, weight if bias is None else bias, y)
        return y

    return run
