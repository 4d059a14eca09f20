"""Checks on a machine with a CUDA device: correctness first, then times.

It runs with torch, triton, timm and numpy alone, from a source tree: `PYTHONPATH=src python3 -m replknet.bench.gpu`.
Every backend that takes a call is measured by name, and torch's own convolution in both layouts beside it, in its
benchmark mode. A way whose result misses the float64 definition gets no time.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.bench.cases import Case
from replknet.bench.gpu_counts import counts
from replknet.bench.harness import Record, Timing, append, quantiles_of
from replknet.kernels import BACKENDS, Call, reference
from replknet.kernels.triton_plan import PatchTile

_LAYERS = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
# the most telling first: what comes after the time limit is left out, and named
CASES: tuple[Case, ...] = (
    *(Case(f"31b.{h}.n64", (64, c, h, h), k) for c, h, k in _LAYERS),
    *(Case(f"table1.r{r}.k{k}", (64, 384, r, r), k) for k in (31, 3) for r in (16, 32, 64)),
    *(Case(f"31b.{h}.n1", (1, c, h, h), k) for c, h, k in _LAYERS),
    *(Case(f"table1.r{r}.k{k}", (64, 384, r, r), k) for k in (7, 13) for r in (16, 32, 64)),
    *(Case(f"31b.{h}.512px.n4", (4, c, h, h), k) for c, h, k in ((128, 128, 31), (256, 64, 29), (512, 32, 27))),
    *(Case(f"convnext.{h}.n64", (64, c, h, h), 7) for c, h in ((96, 56), (192, 28), (384, 14), (768, 7))),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of the channel's rms: rounding of the result to the dtype, with room for TF32-free float32 sums
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_LIMIT_S = 400.0
# what a way may take of the device, and how many times it is called at least
_WAY_S = 0.1
_LEAST_CALLS = 3

# dy, x, weight -> y, dx, dw
Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]
Timer = Callable[[Callable[[], Any]], Timing]


@dataclass(frozen=True)
class Wrong:
    """A way whose result is not the definition's."""

    way: str
    error: float


def main(argv: list[str] | None = None) -> int:
    """Check and time everything; 1 if something is wrong or there is no device."""
    p = argparse.ArgumentParser(
        prog="python -m replknet.bench.gpu",
        description="check and time the operator on a CUDA device",
        epilog="example: python -m replknet.bench.gpu --output benchmarks/results/gpu_h100_2026-11-24.jsonl",
        allow_abbrev=False,
    )
    p.add_argument("--output", type=Path, help="file to which the records are appended as JSON lines")
    p.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds after which the other cases are left out")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    # torch's stubs do not know it
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; cuDNN's float32 convolutions: ieee")
    end = time.monotonic() + args.limit
    good = True
    left_out = []
    records: list[Record] = []
    for dtype in DTYPES:
        for case in CASES:
            if time.monotonic() > end:
                left_out.append(f"{case.name} {_name(dtype)}")
                continue
            found = list(measure(case, dtype, "cuda", device_time))
            good = good and not any(isinstance(one, Wrong) for one in found)
            print("\n".join(rows(case, dtype, found)), flush=True)
            new = [one for one in found if isinstance(one, Record)]
            records += new
            if args.output is not None:
                append(args.output, new)
            torch.cuda.empty_cache()
    print("\n".join(headline(records)))
    if left_out:
        print(f"left out after {args.limit:g} s: {', '.join(left_out)}")
    return 0 if good else 1


def device_time(call: Callable[[], Any]) -> Timing:
    """Quantiles of the time on the device, from replays of a CUDA graph: launches from Python cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and lets cuDNN choose
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    while len(times) < _LEAST_CALLS or (sum(times) < 1e3 * _WAY_S and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return quantiles_of(times)


def measure(case: Case, dtype: torch.dtype, device: str, timer: Timer) -> Iterator[Record | Wrong]:
    """Every way of one case: its times forward, and forward and backward, or what is wrong with it."""
    x, dy, weight = _tensors(case, dtype, device)
    truth = _truth(dy, x, weight)
    for layout in ("nchw", "nhwc"):
        form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        dy_here, x_here = dy.contiguous(memory_format=form), x.contiguous(memory_format=form)
        for name, (forward, both) in _ways(case, dtype, device, layout == "nhwc").items():
            way = f"{name} {layout}"
            error = _error(both(dy_here, x_here, weight), truth)
            if not error <= _BOUNDS[dtype]:
                yield Wrong(way, error)
                continue
            for what, run in (("forward", forward), ("step", both)):
                yield Record(
                    suite=f"gpu.{_name(dtype)}",
                    case=case.name,
                    shape=case.shape,
                    kernel=case.kernel,
                    what=what,
                    way=way,
                    backend=name,
                    timing=timer(partial(run, dy_here, x_here, weight)),
                    excess=round(error / _BOUNDS[dtype], 3),
                    flops=case.flops * (3 if what == "step" else 1),
                    useful_flops=case.useful_flops * (3 if what == "step" else 1),
                )


def rows(case: Case, dtype: torch.dtype, found: list[Record | Wrong]) -> list[str]:
    """The table of one case; the floor is that of the forward pass in 16 bits."""
    floor = counts(case, PatchTile(by_image=case.shape[0] >= 64)).floor_us
    lines = [
        f"{case.name} {_name(dtype)}, {list(case.shape)} {case.kernel}x{case.kernel}, floor {floor:.0f} us in 16 bits"
    ]
    best = {
        what: min(
            (r.timing.p50_ms for r in found if isinstance(r, Record) and r.what == what and r.backend == "torch"),
            default=None,
        )
        for what in ("forward", "step")
    }
    for one in found:
        if isinstance(one, Wrong):
            lines.append(f"  {one.way:14} WRONG by {one.error:.1e}, not timed")
            continue
        torch_ms = best[one.what]
        times = "" if torch_ms is None else f"{torch_ms / one.timing.p50_ms:8.2f} x torch's better layout"
        part = f", {floor / 1e3 / one.timing.p50_ms:.0%} of the floor" if one.what == "forward" else ""
        lines.append(f"  {one.way:14} {one.what:8} {1e3 * one.timing.p50_ms:10.1f} us {times}{part}")
    return lines


def headline(records: list[Record]) -> list[str]:
    """The fastest 31x31 against the fastest 3x3, as the paper compares them in its Table 1."""
    fastest: dict[tuple[str, str], Record] = {}
    for one in records:
        key = one.suite, one.case
        if one.what == "forward" and (key not in fastest or one.timing.p50_ms < fastest[key].timing.p50_ms):
            fastest[key] = one
    lines = []
    for (suite, case), large in fastest.items():
        small = fastest.get((suite, case.removesuffix("31") + "3"))
        if case.startswith("table1.") and case.endswith(".k31") and small is not None:
            times = large.timing.p50_ms / small.timing.p50_ms
            lines.append(f"{suite} {case}: {large.way} takes {times:.2f} times {small.way}'s 3x3")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = (torch.randn(case.shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(case.shape[1], 1, case.kernel, case.kernel, device=device) / case.kernel
    return x, dy, weight.to(dtype)


def _ways(case: Case, dtype: torch.dtype, device: str, channels_last: bool) -> dict[str, tuple[Way, Way]]:
    """By name: forward, and forward with both gradients."""
    call = Call(
        shape=case.shape, kernel=(case.kernel, case.kernel), dtype=dtype, device=device, channels_last=channels_last
    )
    found: dict[str, tuple[Way, Way]] = {"torch": (partial(_torch, case, False), partial(_torch, case, True))}
    for backend in BACKENDS:
        # aten is torch's own on a GPU
        if backend.name in ("aten", reference.BACKEND.name) or backend.refusal(call) is not None:
            continue

        def run(gradients: bool, dy: Tensor, x: Tensor, weight: Tensor, backend: Any = backend) -> Any:
            y = backend.forward(x, weight, None, False, "auto")
            if not gradients:
                return (y,)
            dx, dw, _ = backend.backward(dy, x, weight, [True, True, False], "auto")
            return y, dx, dw

        found[backend.name] = partial(run, False), partial(run, True)
    return found


def _torch(case: Case, gradients: bool, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    reach, c = case.kernel // 2, case.shape[1]
    y = conv2d(x, weight, padding=reach, groups=c)
    if not gradients:
        return (y,)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [reach] * 2, [1, 1], False, [0, 0], c, [True, True, False]
    )
    return y, dx, dw


def _truth(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[list[int], tuple[Tensor | None, ...]]:
    """y, dx and dw in float64 of some channels, the first and the last among them, and which those are."""
    c = x.shape[1]
    chosen = sorted({0, c // 3, c // 2, c - 1})
    part = [t[:, chosen].double() for t in (dy, x)]
    inner = weight[chosen].double()
    y = reference.forward(part[1], inner, None, False)
    dx, dw, _ = reference.backward(part[0], part[1], inner, [True, True, False])
    return chosen, (y, dx, dw)


def _error(found: tuple[Tensor | None, ...], truth: tuple[list[int], tuple[Tensor | None, ...]]) -> float:
    """The largest relative error of a chosen channel, in the norm."""
    chosen, expected = truth
    worst = 0.0
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got is not None
        assert want is not None
        axes = (0, 2, 3) if i < 2 else (1, 2, 3)
        part = got[:, chosen] if i < 2 else got[chosen]
        norms = (torch.linalg.vector_norm(t, dim=axes) for t in (part.double() - want, want))
        errors = next(norms) / next(norms)
        if not errors.isfinite().all():
            return float("inf")
        worst = max(worst, errors.max().item())
    return worst


if __name__ == "__main__":
    sys.exit(main())
