"""Times that can be compared: interleaved in one process, as quantiles, one JSON record each."""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Quantiles of the wall time of one call, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int


def interleaved(calls: Mapping[str, Callable[[], Any]], runs: int = 20, limit_s: float = 60.0) -> dict[str, Timing]:
    """Time several ways of doing the same, in turns, so that a disturbance hits all alike.

    Args:
        calls: name -> what to time; each is called once beforehand, untimed.
        runs: rounds.
        limit_s: after at least three rounds, stop when this much time has passed.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(runs):
        if done >= 3 and time.perf_counter() - start > limit_s:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {name: _timing(values) for name, values in times.items()}


def _timing(values: list[float]) -> Timing:
    fifths = quantiles(values, n=10)
    return Timing(fifths[1], fifths[4], fifths[7], len(values))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement, as a line of a file under benchmarks/results."""

    case: str
    what: str
    timing: Timing
    device: str = field(default_factory=lambda: _device())
    threads: int = field(default_factory=torch.get_num_threads)
    torch: str = str(torch.__version__)
    commit: str = field(default_factory=lambda: _commit())
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


def append(path: Path, records: list[Record]) -> None:
    """Add records to a file; earlier ones are never edited."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
