"""RepLKNet-31B on a CUDA device: its inference form, the merged network, and torch's own convolution.

It needs only torch, triton, timm and numpy, and a source tree:
`PYTHONPATH=src python3 -m replknet.bench.gpu_inference`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from replknet.bench.gpu import file_name
from replknet.bench.gpu_layers import Timer, Wrong
from replknet.bench.gpu_networks import rows, steady_time
from replknet.bench.records import Record, append
from replknet.deploy.inference import BOUNDS, optimize
from replknet.difference import largest_difference
from replknet.kernels import use_backend
from replknet.nn import merge

_DTYPE = torch.bfloat16
# (images, side in pixels)
CASES = ((1, 224), (8, 224), (64, 224), (1, 384), (8, 384))
_LIMIT_S = 120.0


def main(argv: list[str] | None = None) -> int:
    """Check and time every case. Returns 1 if a result is wrong or there is no device."""
    p = argparse.ArgumentParser(
        prog="python -m replknet.bench.gpu_inference",
        description="check and time the inference form of RepLKNet-31B in bfloat16 on a CUDA device",
        epilog="example: python -m replknet.bench.gpu_inference --folder benchmarks/results",
        allow_abbrev=False,
    )
    p.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="where the records are appended")
    p.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds after which the other cases are left out")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    end = time.monotonic() + args.limit
    found: list[Record | Wrong] = []
    for images, size in CASES:
        if time.monotonic() > end:
            print(f"left out after {args.limit:g} s: {images} of {size} pixels")
            continue
        new = list(measure("cuda", steady_time, images, size))
        print("\n".join(rows(new)), flush=True)
        append(args.folder / file_name("inference"), [one for one in new if isinstance(one, Record)])
        found += new
    return int(any(isinstance(one, Wrong) for one in found))


def measure(
    device: str, timer: Timer, images: int, size: int, model: str = "replknet_31b", compile: bool = True
) -> Iterator[Record | Wrong]:
    """One record for each way of running a network, or what is wrong with it.

    Args:
        device: "cuda".
        timer: times a call.
        images: images in a batch.
        size: side of the images, pixels.
        model: registered name.
        compile: also measure the inference form that may be compiled.
    """
    torch.manual_seed(0)
    source = timm.create_model(model, num_classes=1000).to(device).eval()
    x = torch.randn(images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), use_backend("aten"):
        truth = source(x).float()
    merged = merge(source).to(_DTYPE).to(memory_format=torch.channels_last)
    few = x.to(_DTYPE)
    ways: dict[str, Callable[[], Any]] = {"inference form": partial(optimize(source, x, dtype=_DTYPE), few)}
    if compile:
        ways["inference form or compiled"] = partial(optimize(source, x, dtype=_DTYPE, compile=True), few)
    ways["merged"] = partial(_run, merged, few, None)
    ways["torch"] = partial(_run, merged, few, "aten")
    for way, call in ways.items():
        error = largest_difference(truth, call().float())[1]
        if not error <= BOUNDS[_DTYPE]:
            yield Wrong(f"{model} {way}", error)
            continue
        yield Record(
            suite="gpu.inference",
            case=f"{model}.{size}",
            shape=tuple(x.shape),
            kernel=None,
            what="inference",
            way=way,
            backend="torch" if way == "torch" else "operator",
            timing=timer(call),
            excess=round(error / BOUNDS[_DTYPE], 3),
        )


def _run(model: nn.Module, x: Tensor, backend: str | None) -> Tensor:
    with use_backend(backend), torch.inference_mode():
        y: Tensor = model(x)
        return y


if __name__ == "__main__":
    sys.exit(main())
