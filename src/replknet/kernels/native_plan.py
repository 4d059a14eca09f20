"""How the C++ core carries out a call: by the direct kernels, or by Fourier transforms of chosen lengths.

A pure function of the sizes of map and kernel. The constants are times of parts of the kernels, measured with warm
caches on one core of an AMD EPYC (Zen 3) with AVX2. Other machines differ, but the choices depend on ratios. The
benchmark suite `plans` compares the choices with the clock, and a test holds the choices to its records.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

# transform length -> ns of a column (forward, times a spectrum, back) and ns of a row (forward and back), for eight
# channels
_STEPS_NS: dict[int, tuple[int, int]] = {
    16: (62, 33),
    20: (78, 41),
    24: (97, 48),
    28: (146, 67),
    32: (150, 72),
    36: (176, 83),
    40: (205, 87),
    48: (290, 108),
    64: (420, 160),
    72: (512, 178),
    80: (590, 225),
    96: (810, 280),
    112: (1160, 370),
    128: (1260, 410),
    144: (1350, 480),
    256: (3230, 1190),
}
LENGTHS = tuple(_STEPS_NS)
LANES = 8  # channels in the times above
BLOCK = 16  # channels that are worked on together
# slow-down factor inside a call: the steps were timed alone, in the first-level cache
_IN_A_CALL = 1.5
# for each pixel of a tile that overlaps others, which is copied first
_COPIED_NS = 1.5
# extra time for each bin once the bins of a tile exceed the second-level cache
_CACHE_BYTES = 400_000
_MISSED_NS = 3.0
# the direct kernels, for eight channels: a product in the dense and in the tiled form; each row of taps that a tile of
# outputs meets; the fixed cost of a tile
_DENSE_PRODUCT_NS = 0.26
_TILE_PRODUCT_NS = 0.19
_TAPS_ROW_NS = 2.5
_TILE_NS = 46.0
# extra time for each output once the image exceeds the second-level cache
_FAR_OUTPUT_NS = 4.0
_STRIP_BYTES = 200_000
_WIDEST = 14  # most outputs that the direct kernels keep in registers


@dataclass(frozen=True)
class Plan:
    """One way to carry out a call, and its estimated time."""

    algorithm: str  # "direct" or "fft"
    tile: tuple[int, int]  # outputs a tile, height and width
    lengths: tuple[int, int] = (0, 0)  # of the transforms, height and width
    ns: float = 0.0  # estimate for a block of 16 channels of one image, on one core

    def __str__(self) -> str:
        tile = f"tiles of {self.tile[0]}x{self.tile[1]} outputs"
        how = f"transforms of {self.lengths[0]}x{self.lengths[1]}, {tile}" if self.algorithm == "fft" else tile
        return f"{self.algorithm}: {how}, {self.ns / 1000:.1f} us a block of {BLOCK} channels"


def reach(size: int, side: int) -> int:
    """Taps on each side of the centre that can meet an image of this size."""
    return min(side // 2, size - 1)


def _axis_candidates(size: int, side: int) -> list[tuple[int, int]]:
    """(tile, length) of one axis: the whole axis as one tile, or tiles that overlap by the kernel."""
    r = reach(size, side)
    found = [(size, length) for length in LENGTHS if length >= size + r][:3]
    for length in LENGTHS:
        longest = length - 2 * r
        if 0 < longest < size:
            tiles = ceil(size / longest)
            found.append((ceil(size / tiles), length))
    return found


def _fft_ns(h: int, w: int, kh: int, kw: int, vertical: tuple[int, int], horizontal: tuple[int, int]) -> float:
    (th, lh), (tw, lw) = vertical, horizontal
    rows_in = th if th == h else th + 2 * reach(h, kh)
    bins = lw // 2 + 1
    column, row = _STEPS_NS[lh][0], _STEPS_NS[lw][1]
    ns = bins * column + (rows_in + th) / 2 * row
    if bins * rows_in * 2 * 4 * BLOCK > _CACHE_BYTES:
        ns += _MISSED_NS * bins * rows_in
    ns *= _IN_A_CALL
    if (th, tw) != (h, w):
        ns += _COPIED_NS * rows_in * (tw if tw == w else tw + 2 * reach(w, kw))
    return BLOCK / LANES * ceil(h / th) * ceil(w / tw) * ns


def _seen(size: int, side: int) -> int:
    """Pairs of an input and an output on one axis that the kernel connects."""
    r = reach(size, side)
    return size * (2 * r + 1) - r * (r + 1)


def _direct_ns(h: int, w: int, kh: int, kw: int) -> float:
    rw, rows = reach(w, kw), _seen(h, kh)
    if w <= _WIDEST and rw == w - 1:
        ns = rows * w * w * _DENSE_PRODUCT_NS + h * _TILE_NS
    else:
        tiles = ceil(w / _WIDEST)
        products = tiles * ceil(w / tiles) * (2 * rw + 1)
        ns = rows * (products * _TILE_PRODUCT_NS + tiles * _TAPS_ROW_NS) + h * tiles * _TILE_NS
    if 4 * BLOCK * h * w > _CACHE_BYTES:
        ns += h * w * _FAR_OUTPUT_NS
    return BLOCK / LANES * ns


def _strip(h: int, w: int, kh: int, kw: int) -> int:
    """Rows of outputs whose input rows stay in the second-level cache."""
    line = 4 * BLOCK * (w + 2 * reach(w, kw) + _WIDEST)
    return max(1, min(h, max(_STRIP_BYTES // line - 2 * reach(h, kh), reach(h, kh))))


@lru_cache(maxsize=4096)
def candidates(h: int, w: int, kh: int, kw: int) -> tuple[Plan, ...]:
    """All ways to convolve an h x w map with a kh x kw kernel, the fastest first."""
    found = [Plan("direct", (_strip(h, w, kh, kw), w), ns=_direct_ns(h, w, kh, kw))]
    for vertical, horizontal in product(_axis_candidates(h, kh), _axis_candidates(w, kw)):
        ns = _fft_ns(h, w, kh, kw, vertical, horizontal)
        found.append(Plan("fft", (vertical[0], horizontal[0]), (vertical[1], horizontal[1]), ns))
    return tuple(sorted(found, key=lambda plan: plan.ns))


@lru_cache(maxsize=4096)
def plan(h: int, w: int, kh: int, kw: int, algorithm: str = "auto") -> Plan:
    """The fastest way that the algorithm allows."""
    return next(p for p in candidates(h, w, kh, kw) if algorithm in ("auto", p.algorithm))
