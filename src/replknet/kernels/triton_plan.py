"""Which Triton kernel takes a call, and how its work is cut: a pure function of the call and the device.

No figure here comes from a clock. The kernels of 2026-11-28 were timed on an H100, with the tiles that ship for maps of
one size. No other tile was timed, so no other ships for such maps. All tiles compile without spilled registers and
within the shared and tensor memory of their devices (tests/kernels/test_triton.py). Counts chose them: decisions 0004
and 0008.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, gcd
from typing import Literal

import torch
from torch import Tensor

# sm_80: operands of products in registers (8.0, 8.6, 8.9, 12.0); sm_90: in shared memory; sm_100: sums in tensor memory
# (10.x)
Family = Literal["sm_80", "sm_90", "sm_100"]
# the compiler knows the sides of maps up to this side; larger maps share kernels
SMALL_MAP = 16
# programs that fill the largest device: two for each of 132 multiprocessors
_PROGRAMS = 264
# kernels up to this side are summed directly: a patch would mostly multiply zeros
_SMALL_SIDE = 5
# column blocks of a kernel that a program holds at once, as shared memory is small; the others follow in turns
_BLOCKS_AT_ONCE = 3
# kernels wider than this have more column blocks than _BLOCKS_AT_ONCE
_WIDE_SIDE = 33
# limit for a thread where the compiler would otherwise spill registers to run more programs at once
_REGISTERS = 255
_REGISTERS_OF_8_WARPS = 128
# from this number of images on, rows of products are images alone
_MANY_IMAGES = 64
# a width that stands for all maps of several tiles
_WIDE_MAP = 128
# kernels up to this side may be faster as sums; timing on the user's device decides
_DOUBTFUL_SIDE = 9


@dataclass(frozen=True, kw_only=True)
class PatchTile:
    """How the work of the patch kernels is cut into programs."""

    samples: int = 64  # rows of the products: images, or pairs of an image and a row block
    rows: int = 4  # of a patch
    heights: int = 1  # neighbouring row blocks of an image among the samples
    patches: int = 4  # along a row of the output, at most
    by_image: bool = True  # false for few images: samples are pairs of an image and a row block
    near: bool = True  # strips are loaded through the first-level cache
    splits: int = 1  # parts of the sum over samples, for the gradient of the weights
    warps: int = 4
    stages: int = 2
    registers: int | None = None  # limit for a thread; None: the compiler decides
    any_size: bool = False  # one compiled kernel for maps of all sizes; else the compiler knows part or all of the size


@dataclass(frozen=True, kw_only=True)
class DirectTile:
    """How the work of the direct kernels is cut into programs."""

    rows: int = 8  # of the output
    samples: int = 512  # positions of output rows
    channels: int = 1  # more than one for channels_last
    splits: int = 1  # parts of the sum over images and rows, for the gradient of the weights
    warps: int = 4


@dataclass(frozen=True, kw_only=True)
class PlaneTile:
    """How the work of the plane kernels is cut: they hold whole small maps of some images at once."""

    samples: int = 64  # images
    rows: int = 4  # of a patch; 0: the map is one row of all its pixels
    warps: int = 4
    stages: int = 1
    registers: int | None = None


Tile = PatchTile | DirectTile | PlaneTile


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A call as the Triton kernels see it."""

    shape: tuple[int, int, int, int]  # x as [N,C,H,W]
    kernel: tuple[int, int]  # height and width; every tap meets the map somewhere
    dtype: torch.dtype
    device: int  # its index; -1 where there is none
    channels_last: bool = False
    tf32: bool = False
    bias: bool = False
    relu: bool = False
    rotated: bool = False  # the kernel is rotated by 180 degrees, for the gradient for x


# for one kind of call: x, weight, bias -> y, and dy, x -> dw
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
RunGradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Geometry:
    """Where the blocks of a kernel lie against the patches of an image."""

    depth: int  # row blocks of a kernel
    groups: int  # groups of column blocks
    blocks: int  # column blocks of a group
    left: int  # first column of the first block, relative to an output patch: a multiple of 8, for aligned loads
    row_blocks: int  # of an image
    patches: int  # along a row, of a program
    tiles: int  # along a row
    strip_rows: int

    @property
    def strip_elements(self) -> int:
        """Elements of the strips of one channel."""
        return self.strip_rows * self.groups * self.blocks * 256


def geometry(h: int, w: int, kh: int, kw: int, tile: PatchTile) -> Geometry:
    """The geometry of a kernel and a map; every column of the kernel meets the map somewhere."""
    reach = kw // 2
    left = -8 * ceil(reach / 8)
    blocks = ceil((16 - left + reach) / 16)
    depth = ceil((tile.rows + kh - 1) / tile.rows)
    patches = ceil(w / 16)
    if not tile.any_size:
        # blocks that meet the map from none of its patches are left out
        first = max(0, (-16 - left) // 16 + 2 - patches)
        blocks = min(blocks, (w - 1 - left) // 16 + 1) - first
        left += 16 * first
    groups = ceil(blocks / _BLOCKS_AT_ONCE)
    return Geometry(
        depth=depth,
        groups=groups,
        blocks=ceil(blocks / groups),
        left=left,
        row_blocks=ceil(h / tile.rows),
        patches=tile.patches if tile.any_size else min(patches, tile.patches),
        tiles=ceil(patches / tile.patches),
        strip_rows=(depth + 1) * tile.rows - 1,
    )


def family(capability: tuple[int, int]) -> Family:
    if capability[0] == 10:
        return "sm_100"
    return "sm_90" if capability == (9, 0) else "sm_80"


def padded_width(w: int, copied: bool) -> int:
    """The width to which images are padded before they are cut into patches.

    Rows of 16-bit pixels are read 8 bytes at a time: smaller reads need so many addresses and masks that registers
    spill. Small maps are read as they are, since a copy would cost more. With `copied` the layout needs a copy anyway,
    so small maps are padded, too.
    """
    if w % 8 == 0 or (not copied and (w % 4 == 0 or w <= 8 or (w <= 16 and w % 2 == 0))):
        return w
    return ceil(w / 8) * 8


@lru_cache(4096)
def forward_tile(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    tf32: bool,
    channels_last: bool,
    device: Family,
    any_size: bool = False,
) -> Tile:
    """The shipped tile for the convolution of x `[N,C,H,W]`, and for the gradient for x.

    Args:
        shape: shape of x.
        kernel: height and width; every tap meets the map somewhere.
        dtype: dtype of x.
        tf32: whether float32 may be multiplied in TF32.
        channels_last: layout of x.
        device: family of the device.
        any_size: whether the layer's maps change in size; one compiled kernel then serves them all.
    """
    n, _, h, w = shape
    if not _by_patches(kernel, dtype, tf32):
        return _sums(channels_last)
    by_image = n >= _MANY_IMAGES
    if any_size:
        if dtype == torch.float32:
            return PatchTile(
                rows=2, patches=2, samples=32 if device == "sm_80" else 64, by_image=by_image, any_size=True
            )
        tile = _few_rows(32 if device == "sm_80" else 64, by_image, _WIDE_MAP, device)
        return replace(tile, patches=2, any_size=True)
    if dtype == torch.float32:
        samples = _samples(n * ceil(h / 2), 32 if device == "sm_80" else 64, by_image)
        return PatchTile(rows=2, by_image=by_image, patches=2, samples=samples)
    samples = _samples(n * ceil(h / 4), 32 if device == "sm_80" else 64, by_image)
    if samples < 64 or not by_image:
        return _few_rows(samples, by_image, w, device)
    if w > 32 or kernel[1] > _WIDE_SIDE:
        return PatchTile(registers=_REGISTERS)
    if w > 16:
        return PatchTile(samples=128, heights=2, warps=8 if device == "sm_100" else 4)
    if w > 8 or device == "sm_100":
        return PatchTile(samples=256, heights=4, warps=8)
    return PatchTile(samples=128, heights=2)


def forward_tiles(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    tf32: bool,
    channels_last: bool,
    device: Family,
    any_size: bool = False,
) -> tuple[Tile, ...]:
    """`forward_tile`, then the tiles that may be faster, the likeliest first."""
    first = forward_tile(shape, kernel, dtype, tf32, channels_last, device, any_size)
    if not isinstance(first, PatchTile):
        others = (DirectTile(samples=16, channels=64, rows=4), DirectTile(samples=32, channels=32, rows=8))
        if not channels_last:
            others = (DirectTile(samples=256), DirectTile(rows=4, samples=512))
        return first, *others
    if any_size:
        fewer = [replace(first, samples=16, warps=8, registers=_REGISTERS_OF_8_WARPS)] if not first.by_image else []
        sums = [_sums(channels_last)] if max(kernel) <= _DOUBTFUL_SIDE else []
        return first, *fewer, *sums
    n, _, _, w = shape
    found: list[Tile] = [first, *plane_tiles(shape, kernel, dtype, device)]
    found += [tile for tile in _some_images(n, device) if dtype != torch.float32]
    found.append(replace(first, near=False, registers=first.registers or _REGISTERS))
    if not first.by_image or first.samples < 64 or dtype == torch.float32:
        if dtype == torch.float32:
            found += [replace(first, samples=s) for s in (16, 32) if s != first.samples]
        else:
            rows = (16, 32) if device == "sm_80" else (16, 32, 64)
            found += [_few_rows(s, first.by_image, w, device) for s in rows if s != first.samples]
        if w > 32:
            found.append(replace(first, patches=2 if first.patches == 4 else 4))
    elif w <= 32 or (device == "sm_90" and kernel[1] <= _WIDE_SIDE):
        eight = [PatchTile(samples=128, heights=2, warps=8)]
        two = [PatchTile(samples=128, heights=2, patches=2)] if device == "sm_90" else []
        one = PatchTile(registers=_REGISTERS) if device == "sm_100" else PatchTile()
        found += [tile for tile in (one, *eight, *two) if tile != first]
    if max(kernel) <= _DOUBTFUL_SIDE:
        found.append(_sums(channels_last))
    return tuple(found)


def _some_images(n: int, device: Family) -> list[PatchTile]:
    """For 16 to 63 images: several row blocks of each fill the rows of a product, and padding can be left out."""
    most = 32 if device == "sm_80" else 64
    if not 16 <= n < _MANY_IMAGES:
        return []
    heights = max(1, most // (32 if n >= 32 else 16))
    warps = 4 if most == 64 else 8
    registers = _REGISTERS if warps == 4 else _REGISTERS_OF_8_WARPS
    return [PatchTile(samples=most, heights=heights, warps=warps, registers=registers)]


def plane_tiles(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], dtype: torch.dtype, device: Family
) -> tuple[PlaneTile, ...]:
    """Tiles that hold whole small maps in 16 bits, the best counts first; none for other maps.

    They serve kernels of all sizes and both layouts. `padded_width` may widen a map before they see it.
    """
    n, _, h, w = shape
    if dtype == torch.float32 or max(h, w) > SMALL_MAP:
        return ()
    flat = all(in_one_window(h, padded_width(w, copied)) for copied in (False, True))
    samples = next(s for s in (16, 32, 64) if n <= s or s == 64)
    if flat or (samples == 64 and device != "sm_80"):
        cuts = [(samples, 4), (samples, 8), *([(128, 8)] if n > 64 else [])]
    elif samples == 16:
        cuts = [(16, 8), (16, 4)]
    else:  # more samples would spill registers, or there are no more
        cuts = [(32, 8), (16, 8), (16, 4)]
    # with fewer registers the compiler may spill some, or make the images wait for the weight
    tile = PlaneTile(rows=0 if flat else 4, registers=_REGISTERS)
    return tuple(replace(tile, samples=samples, warps=warps) for samples, warps in cuts)


def in_one_window(h: int, w: int) -> bool:
    """Whether a map, wherever it starts, fits a window of 64 elements that begins at a multiple of 8 elements."""
    return h * w + 8 - gcd(h * w, 8) <= 64


def plane_geometry(h: int, w: int, kh: int, kw: int) -> Geometry:
    """The geometry of plane kernels with patches: the 16 x 16 matrices of one column block cover a whole row."""
    return replace(geometry(h, w, kh, kw, PatchTile()), groups=1, blocks=1, left=0)


def _few_rows(samples: int, by_image: bool, w: int, device: Family) -> PatchTile:
    """A tile for products with few rows, or whose rows are pairs of an image and a row block."""
    if samples < 64:
        # with `near` some kernels for wide maps take a few registers too many
        near = w <= {"sm_80": 63, "sm_90": w, "sm_100": 32}[device]
        patches = 2 if device == "sm_100" and w > 64 else 4
        return PatchTile(
            samples=samples, by_image=by_image, patches=patches, near=near, warps=8, registers=_REGISTERS_OF_8_WARPS
        )
    warps = 8 if device == "sm_100" and w <= 8 else 4
    return PatchTile(by_image=by_image, patches=2, warps=warps, registers=_REGISTERS)


def _sums(channels_last: bool) -> DirectTile:
    return DirectTile(samples=32, channels=32, rows=4) if channels_last else DirectTile()


def _samples(pairs: int, most: int, by_image: bool) -> int:
    """Rows of a product. Few pairs of an image and a row block use the instruction for 16 rows, at 0.6 of the rate."""
    if by_image:
        return most
    return next(s for s in (16, 32, most) if pairs <= s or s == most)


@lru_cache(4096)
def gradient_tile(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    tf32: bool,
    device: Family,
    any_size: bool = False,
) -> Tile:
    """The shipped tile for the gradient for the weights; arguments as in `forward_tile`."""
    n, c, h, _ = shape
    kh, kw = kernel
    if not _by_patches(kernel, dtype, tf32):
        programs = c * ceil(kh / 32) * ceil(kw / 32)
        return DirectTile(splits=max(1, min(n * h, ceil(_PROGRAMS / programs))))
    by_image = n >= _MANY_IMAGES
    if device == "sm_80" or dtype == torch.float32:
        samples = _samples(n * ceil(h / 2), 32, by_image or any_size)
        tile = PatchTile(samples=samples, rows=2, patches=2, by_image=by_image, registers=_REGISTERS)
    elif device == "sm_100":  # tensor memory is small
        tile = PatchTile(
            samples=_samples(n * ceil(h / 4), 32, by_image or any_size), patches=2, warps=8, by_image=by_image
        )
    else:
        samples = _samples(n * ceil(h / 4), 64, by_image or any_size)
        tile = PatchTile(samples=samples, by_image=by_image)
    if any_size:
        # in float32 two patches would spill registers
        tile = replace(tile, patches=1 if dtype == torch.float32 else 2, any_size=True)
    return _split(tile, shape, kernel, _PROGRAMS)


def gradient_tiles(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    tf32: bool,
    device: Family,
    any_size: bool = False,
) -> tuple[Tile, ...]:
    """`gradient_tile`, then the tiles that may be faster, the likeliest first."""
    first = gradient_tile(shape, kernel, dtype, tf32, device, any_size)
    if not isinstance(first, PatchTile):
        assert isinstance(first, DirectTile)
        return first, replace(first, splits=2 * first.splits)
    found = [first, *(_split(first, shape, kernel, times * _PROGRAMS) for times in (2, 4))]
    if 16 <= shape[0] < _MANY_IMAGES:
        found.insert(
            1, _split(replace(first, samples=32 if shape[0] >= 32 else 16, by_image=True), shape, kernel, _PROGRAMS)
        )
    if first.samples > 16:
        found.append(_split(replace(first, samples=first.samples // 2), shape, kernel, _PROGRAMS))
    return tuple(dict.fromkeys(found))


def _split(tile: PatchTile, shape: tuple[int, int, int, int], kernel: tuple[int, int], programs: int) -> PatchTile:
    """The tile, with its sum cut into as many parts as give that many programs."""
    n, c, h, w = shape
    g = geometry(h, w, *kernel, tile)
    parts = g.row_blocks * ceil(n / tile.samples) if tile.by_image else ceil(n * g.row_blocks / tile.samples)
    splits = ceil(programs / (c * g.depth * g.groups))
    return replace(tile, splits=max(1, min(parts * g.tiles, splits)))


def _by_patches(kernel: tuple[int, int], dtype: torch.dtype, tf32: bool) -> bool:
    """Whether tensor cores may be used and pay. Float32 stays float32 unless TF32 is allowed."""
    return max(kernel) > _SMALL_SIDE and (dtype != torch.float32 or tf32)
