"""Records of measurements, one JSON line each, with their machine and versions."""

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from replknet.timing import Timing, milliseconds


@cache
def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _versions() -> dict[str, str]:
    # torch's own text also names its build
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("replknet", "timm", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _environment() -> dict[str, str]:
    """Settings that change times."""
    prefixes = ("REPLKNET_", "OMP_", "KMP_", "MKL_", "GOMP_", "MALLOC_", "ATEN_CPU_CAPABILITY", "ONEDNN_", "LD_PRELOAD")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


@cache
def _commit() -> str:
    """The commit of this source tree, with a mark if the tree differs from it; "unknown" if installed."""
    here = Path(__file__)
    try:
        tracked = _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
        found = _git("describe", "--always", "--dirty", "--exclude=*", folder=here.parent) if tracked else ""
    except FileNotFoundError:  # no git
        return "unknown"
    return found or "unknown"


def _git(*words: str, folder: Path) -> str:
    result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def provenance() -> dict[str, Any]:
    """Where figures come from: device, threads, versions, settings, commit and date."""
    return {
        "device": _device(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "environment": _environment(),
        "commit": _commit(),
        "date": _date(),
    }


def _date() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement, as a line of a file under benchmarks/results; docs/benchmarks.md explains the fields."""

    suite: str
    case: str
    shape: tuple[int, ...] | None  # of x, None for several layers
    kernel: int | None
    what: str
    way: str
    backend: str
    timing: Timing
    excess: float | None = None
    flops: int | None = None
    useful_flops: int | None = None
    peak_gflops: float | None = None
    peak_from: str | None = None
    load: dict[str, float | None] = field(default_factory=dict)
    device: str = field(default_factory=_device)
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=_versions)
    environment: dict[str, str] = field(default_factory=_environment)
    commit: str = field(default_factory=_commit)
    date: str = field(default_factory=_date)

    def json(self) -> str:
        return json.dumps(asdict(self))


class ProcessError(RuntimeError):
    """A process that measures memory failed; the text has its last line."""


def append(path: Path, records: list[Record]) -> None:
    """Append records to a file; earlier records are never edited."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(record.json() + "\n" for record in records)


def peak_gflops() -> float:
    """GFLOP/s of a product of 1024x1024 matrices in float32 with torch's threads: the best of 21."""
    a = torch.randn(1024, 1024)
    best = min(milliseconds(lambda: a @ a) for _ in range(21))
    return round(2 * 1024**3 / best / 1e6, 1)
