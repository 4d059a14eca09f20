"""Checks and times on a machine with a CUDA device: layers, then RepLKNet-31B as a whole, then tiles.

It runs with torch, triton, timm and numpy alone, from a source tree: `PYTHONPATH=src python3 -m replknet.bench.gpu`.
A way whose result misses the float64 definition gets no time. The Triton kernels run with the tiles that ship.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from replknet.bench import gpu_layers, gpu_networks, gpu_tiles
from replknet.bench.gpu_layers import DTYPES, Wrong, device_time, name_of
from replknet.bench.harness import Record, append
from replknet.kernels import triton_tune

_LIMIT_S = 330.0


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
    layers: list[Record | Wrong] = []

    def keep(theme: str, found: list[Record | Wrong]) -> None:
        append(args.folder / file_name(theme), [one for one in found if isinstance(one, Record)])

    def run(dtype: torch.dtype) -> None:
        for case in gpu_layers.CASES:
            if time.monotonic() > end:
                left_out.append(f"{case.name} {name_of(dtype)}")
                continue
            found = list(gpu_layers.measure(case, dtype, "cuda", device_time))
            print("\n".join(gpu_layers.rows(case, dtype, found)), flush=True)
            keep("layers", found)
            layers.extend(found)
            torch.cuda.empty_cache()

    run(DTYPES[0])
    networks = list(gpu_networks.measure("cuda", gpu_networks.steady_time))
    keep("networks", networks)
    torch.cuda.empty_cache()
    tiles: list[Record | Wrong] = []
    for case in gpu_tiles.CASES:
        if time.monotonic() > end:
            left_out.append(f"tiles of {case.name}")
            continue
        found = list(gpu_tiles.measure(case, "cuda", device_time))
        print("\n".join(gpu_tiles.rows(case, found)), flush=True)
        tiles += found
    keep("tiles", tiles)
    for dtype in DTYPES[1:]:
        run(dtype)
    print("\n".join(gpu_networks.rows(networks)))
    records = [one for one in layers if isinstance(one, Record)]
    print("\n".join((*gpu_layers.summary(records), *gpu_layers.headline(records))))
    if left_out:
        print(f"left out after {args.limit:g} s: {', '.join(left_out)}")
    wrong = [one for one in (*layers, *networks, *tiles) if isinstance(one, Wrong)]
    for one in wrong:
        print(f"WRONG: {one.way} by {one.error:.1e}")
    return 1 if wrong else 0


def file_name(theme: str) -> str:
    """<theme>_<device>_<date>.jsonl, with the device as people call it: h100, h200, a100."""
    name = torch.cuda.get_device_name()
    found = re.search(r"\b[A-Z]{1,2}\d{2,3}\b", name)
    device = (found[0] if found else re.sub(r"\W+", "-", name)).lower()
    return f"{theme}_{device}_{time.strftime('%Y-%m-%d')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
