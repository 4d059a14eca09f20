"""Pixels inside polygons: the same as in COCO's own API, in memory that does not grow with the coordinates.

COCO's API walks along each edge in steps of a fifth of a pixel and stores every step. Corners far outside of an image
make it ask for gigabytes, or end the process. We compute only the steps that cross the middle of a column of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

# steps in a pixel: COCO's API rounds corners to them
_STEPS = 5
# the step before the middle of column c is 5c + 2
_MIDDLE = 2

_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Edges:
    """The edges of an object's polygons, in steps, rounded as in COCO's API.

    Args:
        x0: x of the start of each edge, `[n]`, int64.
        x1: x of its end.
        y0: y of its start.
        y1: y of its end.
        polygon: number of its polygon.
    """

    x0: _Numbers
    x1: _Numbers
    y0: _Numbers
    y1: _Numbers
    polygon: _Numbers


def edges(polygons: Sequence[Sequence[float]]) -> Edges:
    """The edges of polygons, each given as x, y, x, y, ... of its corners, pixels; at least one."""
    numbers = np.array(list(chain.from_iterable(polygons)), np.float64)
    start = np.trunc(_STEPS * numbers.reshape(-1, 2) + 0.5).astype(np.int64)
    count = np.array([len(polygon) // 2 for polygon in polygons])
    last = count.cumsum()
    end = np.roll(start, -1, 0)
    end[last - 1] = start[last - count]
    return Edges(start[:, 0], end[:, 0], start[:, 1], end[:, 1], np.repeat(np.arange(len(count)), count))


def crossings(found: Edges, width: int) -> int:
    """How often the edges cross the middle of a column of pixels; time and memory of `runs` grow with it."""
    first, last = _columns(found.x0, found.x1, width)
    return int((last - first + 1).sum())


def runs(found: Edges, height: int, width: int) -> _Numbers:
    """Lengths of the runs of pixels outside and inside of an object, in turns, column by column.

    Args:
        found: the edges. The object is the union of their polygons. Where a polygon overlaps itself, it has a hole.
        height: height of the image, pixels.
        width: its width.

    Returns:
        The lengths; the first run is outside. Their sum is `height * width`.

    Source: `rleFrPoly` and `rleMerge` of pycocotools 2.0.11; the pixels are the same.
    """
    first, last = _columns(found.x0, found.x1, width)
    count = last - first + 1
    edge = np.repeat(np.arange(len(count)), count)
    column = np.arange(len(edge)) - np.repeat(count.cumsum() - count, count) + first[edge]
    ends = (found.x0[edge], found.x1[edge], found.y0[edge], found.y1[edge])
    y = _heights(*ends, _STEPS * column + _MIDDLE)
    # rounded up to whole pixels, from the middle of a pixel
    y = (-((_MIDDLE - y) // _STEPS)).clip(0, height)
    # an edge of a polygon enters it or leaves it; the key keeps polygons apart
    total = height * width + 1
    keys = np.sort(found.polygon[edge] * total + column * height + y) % total
    return _union(keys[::2], keys[1::2], height * width)


def _columns(x0: _Numbers, x1: _Numbers, width: int) -> tuple[_Numbers, _Numbers]:
    """The first and the last column inside of the image whose middle an edge crosses; none if first = last + 1."""
    first = (-((_MIDDLE - np.minimum(x0, x1)) // _STEPS)).clip(0, width)
    last = ((np.maximum(x0, x1) - _MIDDLE - 1) // _STEPS).clip(-1, width - 1)
    return first, np.maximum(last, first - 1)


def _heights(x0: _Numbers, x1: _Numbers, y0: _Numbers, y1: _Numbers, step: _Numbers) -> _Numbers:
    """y in steps where an edge goes from `step` to the next: the smaller y of both."""
    dx, dy = np.abs(x1 - x0), np.abs(y1 - y0)
    flat = dx >= dy
    # from the end with the smaller coordinate along the longer side
    turned = np.where(flat, x0 > x1, y0 > y1)
    x0, x1 = np.where(turned, x1, x0), np.where(turned, x0, x1)
    y0, y1 = np.where(turned, y1, y0), np.where(turned, y0, y1)
    slope = np.where(flat, y1 - y0, x1 - x0) / np.where(flat, dx, dy)
    # a flat edge takes one step to the right at a time
    t = step - x0
    here, there = (np.trunc(y0 + slope * steps + 0.5).astype(np.int64) for steps in (t, t + 1))
    # a steep edge takes one step down at a time: look for the first that has passed the middle. The quotient is off
    # by less than one step
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(flat, 0, np.ceil((step + 0.5 - x0) / slope) - 1).astype(np.int64)
    for _ in range(3):
        passed = (np.trunc(x0 + slope * t + 0.5) > step) == (slope > 0)
        t += ~(passed & (t > 0)) & ~flat
    return np.where(flat, np.minimum(here, there), y0 + t - 1)


def _union(starts: _Numbers, ends: _Numbers, total: int) -> _Numbers:
    """Run lengths of the pixels in any of the ranges from start to end."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    apart = starts[1:] > ends[:-1]
    bounds = np.stack([starts[np.append([True], apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]]], 1)
    return np.diff(np.concatenate([[0], bounds.ravel(), [total]]))
