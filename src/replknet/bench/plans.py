"""The cost model against the clock: how much slower the chosen plans of the C++ core are than the best candidates."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from replknet.bench.ops import Found
from replknet.bench.records import Record
from replknet.kernels import native
from replknet.kernels.native_plan import BLOCK, Plan, candidates
from replknet.timing import Load, Timing, interleaved

# largest time of the chosen plan, as a multiple of the best candidate's time
TARGET = 1.3
# a candidate is not tried if its expected time is more than this multiple of the chosen plan's
_HOPELESS = 4.0
# expected time of a call, and fewest and most blocks of channels; it must be long, since a call alone costs 20 us
_LONG_NS = 400_000
_BLOCKS = (4, 256)

# height, width and kernel sides
SHAPES: dict[str, tuple[int, int, int, int]] = {
    f"plan.{h}x{w}.k{kh}x{kw}": (h, w, kh, kw)
    for h, w, kh, kw in (
        *((size, size, 7, 7) for size in (5, 7, 14, 28, 56, 112)),
        *((size, size, 9, 9) for size in (7, 10, 16, 32, 64)),
        *((size, size, 13, 13) for size in (5, 7, 10, 14, 16, 24, 40, 80)),
        *((size, size, 21, 21) for size in (7, 12, 20, 40, 96)),
        *((size, size, 31, 31) for size in (7, 14, 18, 30, 48, 56, 100, 160)),
        *((size, size, 51, 51) for size in (14, 28, 56, 120)),
        *((8, 64, 13, 13), (64, 8, 13, 13), (20, 100, 31, 31), (1, 200, 1, 31), (33, 47, 17, 17)),
        *((56, 56, 51, 5), (56, 56, 5, 51), (40, 40, 1, 11), (40, 40, 11, 1), (28, 28, 3, 31)),
    )
}


@dataclass(frozen=True)
class Comparison:
    """One shape: the time of each candidate, the chosen one first."""

    times: dict[Plan, Timing]

    @property
    def chosen(self) -> Plan:
        return next(iter(self.times))

    @property
    def best(self) -> Plan:
        return min(self.times, key=lambda plan: self.times[plan].p20_ms)

    @property
    def ratio(self) -> float:
        """The chosen plan's time divided by the best candidate's, both at the 20th percentile, the least disturbed."""
        return self.times[self.chosen].p20_ms / self.times[self.best].p20_ms


def channels(h: int, w: int, kh: int, kw: int) -> int:
    """How many channels a shape is timed with."""
    fewest, most = _BLOCKS
    return BLOCK * max(fewest, min(most, round(_LONG_NS / candidates(h, w, kh, kw)[0].ns)))


def compare(h: int, w: int, kh: int, kw: int, runs: int = 10) -> Comparison:
    """Time all candidates that are not hopeless, on one h x w map, channels_last, with one thread."""
    c = channels(h, w, kh, kw)
    x = torch.randn(1, c, h, w).contiguous(memory_format=torch.channels_last)
    weight, y = torch.randn(c, 1, kh, kw), torch.empty_like(x)
    plans = candidates(h, w, kh, kw)
    tried = {str(plan): plan for plan in plans if plan.ns <= _HOPELESS * plans[0].ns}
    times = interleaved({name: partial(native.run_plan, plan, x, weight, y) for name, plan in tried.items()}, runs)
    return Comparison({tried[name]: timing for name, timing in times.items()})


def measure(names: list[str], runs: int) -> Iterator[list[Found]]:
    """For each shape: one record of the chosen plan and one of the best candidate."""
    for name in names:
        load = Load()
        h, w, kh, kw = SHAPES[name]
        found = compare(h, w, kh, kw, runs)
        disturbed = load.end()
        yield [
            Record(
                suite="plans",
                case=name,
                shape=(1, channels(h, w, kh, kw), h, w),
                kernel=max(kh, kw),
                what="forward",
                way=f"{role}: {plan}",
                backend="native",
                timing=found.times[plan],
                load=disturbed,
            )
            for role, plan in (("chosen", found.chosen), ("best", found.best))
        ]
