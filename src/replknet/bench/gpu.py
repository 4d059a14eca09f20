"""Checks and times on a machine with a CUDA device: layers, then whole networks, then tiles.

It needs only torch, triton, timm and numpy, and a source tree: `PYTHONPATH=src python3 -m replknet.bench.gpu`.
A way whose result misses the float64 definition gets no time. The Triton kernels run with the shipped tiles.
"""

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from replknet.bench import gpu_layers, gpu_networks, gpu_tiles
from replknet.bench.cases import Case
from replknet.bench.gpu_layers import DTYPES, Timers, Wrong, device_time, eager_time, name_of
from replknet.bench.records import Record, append
from replknet.kernels import triton_tune

PARTS = ("layers", "networks", "tiles")
_LIMIT_S = 330.0
_TORCH_LIMIT_MS = 20.0
_MOST_WORKERS = 14

Rows = Callable[[list[Record | Wrong]], list[str]]


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    part: str  # one of PARTS
    name: str
    measure: Callable[[], Iterator[Record | Wrong]]
    rows: Rows
    compile: tuple[Callable[[], None], ...]  # calls that compile its kernels


def main(argv: list[str] | None = None) -> int:
    """Check and time what was asked for. Returns 1 if a result is wrong, a job failed, or there is no device."""
    p = _parser()
    args = p.parse_args(argv)
    try:
        todo = jobs(args.part, args.only, args.dtype, args.images, args.torch_limit_ms)
    except ValueError as error:
        p.error(str(error))
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    _settle()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; cuDNN's float32 convolutions: ieee")
    return _run(todo, args.folder, args.limit)


def _run(todo: Sequence[Job], folder: Path, limit_s: float) -> int:
    """Compile, then measure what fits into the time. Returns 1 if a result is wrong or a job failed."""
    start = time.monotonic()
    failed = compile_all(todo)
    print(f"kernels compiled after {time.monotonic() - start:.0f} s", flush=True)
    left_out: list[str] = []
    found: dict[str, list[Record | Wrong]] = {part: [] for part in PARTS}
    for job in todo:
        if job.name in failed:
            continue
        if time.monotonic() > start + limit_s:
            left_out.append(job.name)
            continue
        try:
            new = list(job.measure())
        # torch or the device failed: the other jobs may still work
        except RuntimeError as error:
            traceback.print_exception(error)
            failed[job.name] = str(error)
            continue
        print("\n".join(job.rows(new)), flush=True)
        append(folder / file_name(job.part), [one for one in new if isinstance(one, Record)])
        found[job.part] += new
        torch.cuda.empty_cache()
    print("\n".join(_summary(found)))
    if left_out:
        print(f"left out after {limit_s:g} s: {', '.join(left_out)}")
    for name, text in failed.items():
        print(f"FAILED: {name}: {text}")
    wrong = [one for part in found.values() for one in part if isinstance(one, Wrong)]
    for one in wrong:
        print(f"WRONG: {one.way} by {one.error:.1e}")
    return 1 if wrong or failed else 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m replknet.bench.gpu",
        description="check and time the operator, RepLKNet-31B and the operator's tiles on a CUDA device",
        epilog="example: python -m replknet.bench.gpu --part layers tiles --only '31b.*' --dtype bfloat16",
        allow_abbrev=False,
    )
    p.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to run; by default all")
    p.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="cases by name, such as '31b.*' (layers and tiles) or convnext_base (networks); a name that fits none "
        "shows the list. By default the most telling cases of each part",
    )
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=[name_of(dtype) for dtype in DTYPES],
        help="dtypes of the layers; by default bfloat16, for some layers also float32 and float16",
    )
    p.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=gpu_networks.IMAGES,
        metavar="N",
        help="images in a batch of the networks",
    )
    p.add_argument(
        "--torch-limit-ms",
        type=float,
        default=_TORCH_LIMIT_MS,
        metavar="MS",
        help="a call of torch's convolution that takes longer is timed once; by default %(default)g",
    )
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/results"),
        help="where records are appended to <part>_<device>_<date>.jsonl",
    )
    p.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds after which the other cases are left out")
    return p


def jobs(
    parts: Sequence[str],
    patterns: Sequence[str],
    dtypes: Sequence[str] | None,
    images: Sequence[int],
    torch_limit_ms: float,
) -> list[Job]:
    """What to measure, the most telling first.

    Args:
        parts: names in PARTS.
        patterns: patterns of case names; empty for the most telling cases.
        dtypes: dtypes of the layers; None for bfloat16, and for some layers also the two others.
        images: images in a batch of the networks.
        torch_limit_ms: a call of torch's convolution that takes longer is timed once.

    Raises:
        ValueError: a pattern fits no case of these parts.
    """
    names = {
        "layers": [case.name for case in gpu_layers.CASES],
        "networks": list(gpu_networks.NETWORKS),
        "tiles": [case.name for case in gpu_tiles.CASES],
    }
    there = list(dict.fromkeys(name for part in PARTS if part in parts for name in names[part]))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise ValueError(f"no case of {', '.join(parts)} is called {pattern}; there are {', '.join(there)}")

    def asked(name: str) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    cases = [case for case in gpu_layers.CASES if asked(case.name)] if patterns else gpu_layers.FIRST
    found = _layers(cases, dtypes, torch_limit_ms)
    found += [_network(name, images) for name in gpu_networks.NETWORKS if asked(name)]
    found += [
        Job(
            "tiles",
            f"tiles of {case.name}",
            partial(gpu_tiles.measure, case, "cuda", device_time),
            partial(gpu_tiles.rows, case),
            (partial(gpu_tiles.compile_case, case),),
        )
        for case in gpu_tiles.CASES
        if asked(case.name)
    ]
    return [job for job in found if job.part in parts]


def _layers(cases: Sequence[Case], dtypes: Sequence[str] | None, torch_limit_ms: float) -> list[Job]:
    def asked(case: Case, dtype: torch.dtype) -> bool:
        if dtypes is None:
            return dtype == torch.bfloat16 or case.name in gpu_layers.IN_EVERY_DTYPE
        return name_of(dtype) in dtypes

    timers = Timers(device_time, partial(device_time, limit_ms=torch_limit_ms), eager_time)
    return [
        Job(
            "layers",
            f"{case.name} {name_of(dtype)}",
            partial(gpu_layers.measure, case, dtype, "cuda", timers),
            partial(gpu_layers.rows, case, dtype),
            (partial(gpu_layers.compile_case, case, dtype),),
        )
        for dtype in DTYPES
        for case in cases
        if asked(case, dtype)
    ]


def _network(name: str, images: Sequence[int]) -> Job:
    ways = gpu_networks.NETWORKS[name]
    return Job(
        "networks",
        name,
        partial(gpu_networks.measure, name, ways, images, "cuda", gpu_networks.steady_time),
        gpu_networks.rows,
        tuple(partial(gpu_networks.compile_network, name, n) for n in images if "triton" in ways),
    )


def compile_all(todo: Sequence[Job]) -> dict[str, str]:
    """Compile the jobs' kernels into Triton's cache on disk. Several processes do it; one would take minutes.

    Returns:
        Job name -> why its kernels cannot be compiled.
    """
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    failed: dict[str, str] = {}
    # each process needs its own settings
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_settle) as pool:
        # networks and tiles take longest, so they start first
        begun = [(job, pool.submit(_compile, call)) for job in reversed(todo) for call in job.compile]
        for job, future in begun:
            if (error := future.exception()) is None:
                continue
            traceback.print_exception(error)
            # after a device error, later calls in that process fail, too, though their kernels may be right
            if not isinstance(error, RuntimeError):
                failed[job.name] = f"{type(error).__name__}: {error}"
    return failed


def _compile(call: Callable[[], None]) -> None:
    call()
    torch.cuda.synchronize()
    # the other processes need the memory
    torch.cuda.empty_cache()


def _settle() -> None:
    """Use the shipped tiles, and float32 without TF32."""
    # read at the first call; the records show this variable
    os.environ[triton_tune.VARIABLE] = "0"
    # torch's stubs lack this attribute
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def _summary(found: dict[str, list[Record | Wrong]]) -> list[str]:
    """What people read first, once more at the end: networks, and one line a layer."""
    lines = gpu_networks.rows(found["networks"])
    records = [one for one in found["layers"] if isinstance(one, Record)]
    return [*lines, *gpu_layers.summary(records), *gpu_layers.headline(records)] if records else lines


def file_name(theme: str) -> str:
    """<theme>_<device>_<date>.jsonl with the short name of the device: h100, h200, a100."""
    name = torch.cuda.get_device_name()
    found = re.search(r"\b[A-Z]{1,2}\d{2,3}\b", name)
    device = (found[0] if found else re.sub(r"\W+", "-", name)).lower()
    return f"{theme}_{device}_{time.strftime('%Y-%m-%d')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
