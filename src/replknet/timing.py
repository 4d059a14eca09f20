"""Times that can be compared: ways of doing the same in turns, in one process, as quantiles."""

import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

# a call that takes less is made once untimed before each timed one
_SHORT_MS = 100.0
# calls that take less than this are timed several times a turn
_TURN_S = 0.003


@dataclass(frozen=True)
class Timing:
    """Quantiles of the wall time of one call, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    runs: int = 20,
    limit_s: float = 20.0,
    apart: Collection[str] = (),
    pause_s: float = 0.02,
) -> dict[str, Timing]:
    """Time several ways of doing the same, in turns, so that a disturbance hits all alike.

    Before a short call is timed it is made once untimed, so that each finds the caches and the threads as
    itself left them, not as its neighbour did; then it is timed for three milliseconds, and the median is the
    time of this turn. A long one is warmed up once only and timed once.

    Args:
        calls: name -> what to time.
        runs: rounds, at least 2.
        limit_s: a way that has used up this much time sits out after three rounds.
        apart: names of calls that run on threads of their own. Their turns come first, with a wait before each
            and after the last.
        pause_s: that wait; the threads of OpenMP go on spinning for some milliseconds after a call, and would
            take the processor from another runtime's.
    """
    order = [name for name in calls if name in apart] + [name for name in calls if name not in apart]
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for done in range(runs):
        for i, name in enumerate(order):
            call = calls[name]
            if done >= 3 and spent[name] > limit_s:
                continue
            if i <= len(apart) and apart:
                time.sleep(pause_s)
            start = time.perf_counter()
            if not times[name] or times[name][-1] < _SHORT_MS:
                milliseconds(call)
            times[name].append(_turn(call))
            spent[name] += time.perf_counter() - start
    return {name: quantiles_of(values) for name, values in times.items()}


def _turn(call: Callable[[], Any]) -> float:
    found: list[float] = []
    end = time.perf_counter() + _TURN_S
    while not found or time.perf_counter() < end:
        found.append(milliseconds(call))
    return median(found)


def milliseconds(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - before)


def quantiles_of(values: list[float]) -> Timing:
    # "inclusive": the other method would extrapolate beyond the few values of a slow way, even below zero
    tenths = quantiles(values, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], len(values))


class Load:
    """How busy the machine is with other things, from here to `end()`: a disturbed time is no time."""

    def __init__(self) -> None:
        self._average, self._busy, self._own, self._wall = _load_average(), _busy_s(), _own_s(), time.perf_counter()

    def end(self) -> dict[str, float | None]:
        """Load averages before and after, and processors that other processes kept busy meanwhile."""
        busy, wall = _busy_s(), time.perf_counter() - self._wall
        others = None
        if busy is not None and self._busy is not None and wall > 0:
            others = round(max(0.0, (busy - self._busy - (_own_s() - self._own)) / wall), 2)
        return {"load_before": self._average, "load_after": _load_average(), "others": others}


def _load_average() -> float | None:
    # Windows has none
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy_s() -> float | None:
    """Seconds that all processors have worked, time taken by other virtual machines included."""
    if platform.system() != "Linux":
        return None
    user, nice, kernel, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + kernel + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system
