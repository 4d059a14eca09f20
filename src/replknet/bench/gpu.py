"""Checks and times on a machine with a CUDA device: layers, then RepLKNet-31B as a whole, then tiles.

It runs with torch, triton, timm and numpy alone, from a source tree: `PYTHONPATH=src python3 -m replknet.bench.gpu`.
A way whose result misses the float64 definition gets no time. The Triton kernels run with the tiles that ship.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from replknet.bench import gpu_layers, gpu_networks, gpu_tiles
from replknet.bench.cases import Case
from replknet.bench.gpu_layers import DTYPES, Wrong, device_time, name_of
from replknet.bench.harness import Record, append
from replknet.kernels import triton_tune

_LIMIT_S = 280.0
_MOST_WORKERS = 14
# layers that come before networks and tiles: those of RepLKNet and the first of Table 1
_TELLING = 10

Rows = Callable[[list[Record | Wrong]], list[str]]


def main(argv: list[str] | None = None) -> int:
    """Check and time everything; 1 if something is wrong or there is no device."""
    p = argparse.ArgumentParser(
        prog="python -m replknet.bench.gpu",
        description="check and time the operator, its tiles and RepLKNet-31B on a CUDA device",
        epilog="example: python -m replknet.bench.gpu --folder benchmarks/results",
        allow_abbrev=False,
    )
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/results"),
        help="where records are appended to <theme>_<device>_<date>.jsonl, themes: layers, networks, tiles",
    )
    p.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds after which the other cases are left out")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    # read at the first call; the records show it
    os.environ[triton_tune.VARIABLE] = "0"
    torch.backends.cudnn.benchmark = True
    # torch's stubs do not know it
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; cuDNN's float32 convolutions: ieee")
    end = time.monotonic() + args.limit
    left_out: list[str] = []
    found: dict[str, list[Record | Wrong]] = {"layers": [], "networks": [], "tiles": []}

    def run(theme: str, name: str, measure: Callable[[], Iterable[Record | Wrong]], rows: Rows) -> None:
        if time.monotonic() > end:
            left_out.append(name)
            return
        new = list(measure())
        print("\n".join(rows(new)), flush=True)
        append(args.folder / file_name(theme), [one for one in new if isinstance(one, Record)])
        found[theme] += new
        torch.cuda.empty_cache()

    def layers(dtype: torch.dtype, cases: Sequence[Case]) -> None:
        for case in cases:
            name = f"{case.name} {name_of(dtype)}"
            measure = partial(gpu_layers.measure, case, dtype, "cuda", device_time)
            run("layers", name, measure, partial(gpu_layers.rows, case, dtype))

    compile_all()
    print(f"kernels compiled after {args.limit - end + time.monotonic():.0f} s", flush=True)
    first, others = gpu_layers.CASES[:_TELLING], gpu_layers.CASES[_TELLING:]
    layers(torch.bfloat16, first)
    run("networks", "networks", partial(gpu_networks.measure, "cuda", gpu_networks.steady_time), gpu_networks.rows)
    for case in gpu_tiles.CASES:
        measure = partial(gpu_tiles.measure, case, "cuda", device_time)
        run("tiles", f"tiles of {case.name}", measure, partial(gpu_tiles.rows, case))
    layers(torch.bfloat16, others)
    for dtype in (torch.float32, torch.float16):
        layers(dtype, gpu_layers.CASES)
    print("\n".join(gpu_networks.rows(found["networks"])))
    records = [one for one in found["layers"] if isinstance(one, Record)]
    print("\n".join((*gpu_layers.summary(records), *gpu_layers.headline(records))))
    if left_out:
        print(f"left out after {args.limit:g} s: {', '.join(left_out)}")
    wrong = [one for theme in found.values() for one in theme if isinstance(one, Wrong)]
    for one in wrong:
        print(f"WRONG: {one.way} by {one.error:.1e}")
    return 1 if wrong else 0


def compile_all() -> None:
    """Compile what the layers need, into Triton's cache on disk, in several processes: alone it would take minutes."""
    calls = [(case, dtype) for dtype in DTYPES for case in gpu_layers.CASES]
    workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        # an error of a kernel comes up here
        list(pool.map(gpu_layers.compile_case, *zip(*calls, strict=True)))


def file_name(theme: str) -> str:
    """<theme>_<device>_<date>.jsonl, with the device as people call it: h100, h200, a100."""
    name = torch.cuda.get_device_name()
    found = re.search(r"\b[A-Z]{1,2}\d{2,3}\b", name)
    device = (found[0] if found else re.sub(r"\W+", "-", name)).lower()
    return f"{theme}_{device}_{time.strftime('%Y-%m-%d')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
