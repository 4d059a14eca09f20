"""Times that can be compared: several ways to do one job take turns in one process, and give quantiles."""

import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

# before each timed call, a call shorter than this is made once untimed
_SHORT_MS = 100.0
# calls shorter than this are timed several times a turn
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
    """Time several ways to do one job in turns, so that a disturbance hits all alike.

    Each turn of a short call starts with an untimed call. So it finds the caches and threads as it left them itself,
    not as its neighbour did. It is then timed for three milliseconds, and the median is the time of this turn. A long
    call is warmed up only once, before its first turn, and is timed once a turn.

    Args:
        calls: name -> what to time.
        runs: rounds, at least 2.
        limit_s: a way that has used up this much time sits out after three rounds.
        apart: names of calls that run on threads of their own. Their turns come first, with a wait before each
            and after the last.
        pause_s: seconds of this wait. OpenMP's threads spin for some milliseconds after a call, and would take the
            processor from the threads of another runtime.
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
    # not "exclusive", which would extrapolate beyond the few values of a slow way, even below zero
    tenths = quantiles(values, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], len(values))


class Load:
    """How busy other processes keep the machine, from here to `end()`: a disturbed time does not count."""

    def __init__(self) -> None:
        self._average, self._busy, self._own, self._wall = _load_average(), _busy_s(), _own_s(), time.perf_counter()

    def end(self) -> dict[str, float | None]:
        """Load averages before and after, and the number of processors that other processes kept busy meanwhile."""
        busy, wall = _busy_s(), time.perf_counter() - self._wall
        others = None
        if busy is not None and self._busy is not None and wall > 0:
            others = round(max(0.0, (busy - self._busy - (_own_s() - self._own)) / wall), 2)
        return {"load_before": self._average, "load_after": _load_average(), "others": others}


def _load_average() -> float | None:
    # Windows has no load average
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy_s() -> float | None:
    """Seconds that all processors have worked, including time that other virtual machines took."""
    if platform.system() != "Linux":
        return None
    user, nice, kernel, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + kernel + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system
