"""The operator's layers on a CUDA device: every way is compared with float64, then timed.

The ways are torch's own convolution and every backend that takes a call, in both layouts. Times cover the device
alone. For one image there are also times with the launches from Python.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.bench.cases import Case
from replknet.bench.gpu_counts import counts
from replknet.bench.records import Record
from replknet.kernels import BACKENDS, Call, reference
from replknet.kernels.triton_plan import forward_tile
from replknet.timing import Timing, quantiles_of

_LAYERS = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
_SIDES = (16, 32, 64)
# the default cases, the most telling first, since the time limit leaves out the last ones
FIRST: tuple[Case, ...] = (
    *(Case(f"31b.{h}.n{n}", (n, c, h, h), k) for n in (1, 32, 64) for c, h, k in _LAYERS),
    *(Case(f"table1.r{r}.k{k}", (64, 384, r, r), k) for k in (31, 3, 13, 7, 21, 5) for r in _SIDES),
)
CASES: tuple[Case, ...] = (
    *FIRST,
    *(Case(f"table1.r{r}.n1.k7", (1, 384, r, r), 7) for r in _SIDES),
    *(Case(f"31b.{h}.512px.n4", (4, c, h, h), k) for c, h, k in ((128, 128, 31), (256, 64, 29), (512, 32, 27))),
    *(Case(f"convnext.{h}.n64", (64, c, h, h), 7) for c, h in ((96, 56), (192, 28), (384, 14), (768, 7))),
    # UniRepLKNet-S, Ding et al. 2024, arXiv:2311.15599
    *(Case(f"unireplknet.{h}.n64", (64, c, h, h), 13) for c, h in ((192, 28), (384, 14), (768, 7))),
)
# the cases that are measured in float32 and float16, too
IN_EVERY_DTYPE = ("31b.56.n64", "31b.14.n64", "table1.r32.k31")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# allowed error relative to the channel's norm: rounding of the result, with room for float32 sums without TF32
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# seconds of the device for one way, and the least number of calls
_WAY_S = 0.1
_LEAST_CALLS = 3
# a call that takes longer is timed once, without a graph: its launch does not matter
_LONG_MS = 50.0
_EAGER_ROUNDS = 10
_EAGER_CALLS = 20
# for larger kernels, cuDNN's trial of all its algorithms takes seconds to minutes
_LARGEST_TRIAL = 7

# dy, x, weight -> y, dx, dw
Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]
Timer = Callable[[Callable[[], Any]], Timing]


@dataclass(frozen=True)
class Timers:
    """Timers for a call of a backend, for a call of torch's convolution, and for either with its launches."""

    backend: Timer
    torch: Timer
    eager: Timer


@dataclass(frozen=True)
class Wrong:
    """A way whose result misses the definition."""

    way: str
    error: float


def device_time(call: Callable[[], Any], limit_ms: float = _LONG_MS) -> Timing:
    """Quantiles of the time on the device, from replays of a CUDA graph: launches from Python cost nothing.

    A call that takes longer than `limit_ms` is timed once, without a graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles, and lets cuDNN choose
        first = _device_ms(call)
        if first > limit_ms:
            return Timing(first, first, first, runs=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    while len(times) < _LEAST_CALLS or (sum(times) < 1e3 * _WAY_S and len(times) < 100):
        times.append(_device_ms(graph.replay))
    return quantiles_of(times)


def eager_time(call: Callable[[], Any]) -> Timing:
    """Quantiles of the wall time a call, over several calls without a wait between them."""
    call()
    times: list[float] = []
    for _ in range(_EAGER_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_EAGER_CALLS):
            call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / _EAGER_CALLS)
    return quantiles_of(times)


def once(call: Callable[[], Any]) -> Timing:
    """A timer that times nothing: it makes the call once, so that its kernels are compiled."""
    call()
    return Timing(0.0, 0.0, 0.0, runs=1)


@contextmanager
def cudnn_trials(kernel: int) -> Iterator[None]:
    """In this context cuDNN tries all its algorithms, unless the kernel's side is large."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = kernel <= _LARGEST_TRIAL
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _device_ms(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, dtype: torch.dtype, device: str, timers: Timers) -> Iterator[Record | Wrong]:
    """For every way of a case: its times, forward and forward with backward, or what is wrong with it."""
    x, dy, weight = tensors(case, dtype, device)
    truth = truth_of(dy, x, weight)
    for layout in ("nchw", "nhwc"):
        form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        dy_here, x_here = dy.contiguous(memory_format=form), x.contiguous(memory_format=form)
        for name, (forward, both) in _ways(case, dtype, device, layout == "nhwc").items():
            way = f"{name} {layout}"
            with cudnn_trials(case.kernel):
                error = error_of(both(dy_here, x_here, weight), truth)
                right = error <= _BOUNDS[dtype]
                calls = {
                    what: partial(run, dy_here, x_here, weight) for what, run in (("forward", forward), ("step", both))
                }
                timer = timers.torch if name == "torch" else timers.backend
                times = _times(calls, timer, timers.eager if case.shape[0] == 1 else None) if right else {}
            if not right:
                yield Wrong(way, error)
            for what, timing in times.items():
                products = 3 if what.startswith("step") else 1
                yield Record(
                    suite=f"gpu.{name_of(dtype)}",
                    case=case.name,
                    shape=case.shape,
                    kernel=case.kernel,
                    what=what,
                    way=way,
                    backend=name,
                    timing=timing,
                    excess=round(error / _BOUNDS[dtype], 3),
                    flops=case.flops * products,
                    useful_flops=case.useful_flops * products,
                )


def _times(calls: Mapping[str, Callable[[], Any]], timer: Timer, eager: Timer | None) -> dict[str, Timing]:
    """Call name -> time; `NAME, eager` -> time with launches."""
    found: dict[str, Timing] = {}
    for what, call in calls.items():
        found[what] = timer(call)
        # a call long enough to be timed once does not depend on its launches
        if eager is not None and found[what].runs > 1:
            found[f"{what}, eager"] = eager(call)
    return found


def compile_case(case: Case, dtype: torch.dtype, device: str = "cuda") -> None:
    """Call our kernels once in every way that `measure` does."""
    x, dy, weight = tensors(case, dtype, device)
    for form in (torch.contiguous_format, torch.channels_last):
        for name, (_, both) in _ways(case, dtype, device, form is torch.channels_last).items():
            if name != "torch":
                both(dy.contiguous(memory_format=form), x.contiguous(memory_format=form), weight)


def rows(case: Case, dtype: torch.dtype, found: list[Record | Wrong]) -> list[str]:
    """The table of one case; the memory's rate is for the forward pass in 16 bits on an H100."""
    side = min(case.kernel, 2 * case.shape[2] - 1)
    memory = counts(case, forward_tile(case.shape, (side, side), torch.bfloat16, False, False, "sm_90")).memory_us
    lines = [
        f"{case.name} {name_of(dtype)}, {list(case.shape)} {case.kernel}x{case.kernel}, "
        f"memory alone {memory:.0f} us in 16 bits"
    ]
    best: dict[str, float] = {}
    for one in found:
        if isinstance(one, Record) and one.backend == "torch":
            best[one.what] = min(best.get(one.what, float("inf")), one.timing.p50_ms)
    for one in found:
        if isinstance(one, Wrong):
            lines.append(f"  {one.way:14} WRONG by {one.error:.1e}, not timed")
            continue
        p50_ms = one.timing.p50_ms
        times = f"{best[one.what] / p50_ms:8.2f} x torch's better layout" if one.what in best else ""
        part = f", {memory / 1e3 / p50_ms:.0%} of the memory's rate" if one.what == "forward" else ""
        calls = ", one call" if one.timing.runs == 1 else ""
        lines.append(f"  {one.way:14} {one.what:14} {1e3 * p50_ms:10.1f} us {times}{part}{calls}")
    return lines


def summary(records: list[Record]) -> list[str]:
    """One line a case and dtype: the fastest Triton way and the fastest torch way, us, forward and with gradients.

    Eager times have their own line.
    """
    fastest: dict[tuple[str, str, str, str], float] = {}
    for one in records:
        who = "triton" if one.backend == "triton" else "torch"
        key = one.case, one.suite, one.what, who
        fastest[key] = min(fastest.get(key, float("inf")), 1e3 * one.timing.p50_ms)
    lines = [
        f"{'case':<22} {'dtype':<15}" + "".join(f"{what:>12} {'torch':>10} {'x':>6}" for what in ("forward", "step"))
    ]
    modes = [one.what.removeprefix("forward").removeprefix("step") for one in records]
    kinds = dict.fromkeys((one.case, one.suite, mode) for one, mode in zip(records, modes, strict=True))
    for case, suite, mode in kinds:
        cells = ""
        for what in ("forward", "step"):
            ours, torchs = (fastest.get((case, suite, what + mode, who)) for who in ("triton", "torch"))
            ratio = f"{torchs / ours:>6.2f}" if ours is not None and torchs is not None else f"{'-':>6}"
            cells += f"{_us(ours):>12} {_us(torchs):>10} {ratio}"
        lines.append(f"{case:<22} {suite.removeprefix('gpu.') + mode:<15}{cells}")
    return lines


def _us(time: float | None) -> str:
    return "-" if time is None else f"{time:.1f}"


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


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy `[N,C,H,W]` and a weight of about unit gain."""
    x, dy = (torch.randn(case.shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(case.shape[1], 1, case.kernel, case.kernel, device=device) / case.kernel
    return x, dy, weight.to(dtype)


def _ways(case: Case, dtype: torch.dtype, device: str, channels_last: bool) -> dict[str, tuple[Way, Way]]:
    """Way name -> forward, and forward with both gradients."""
    call = Call(
        shape=case.shape, kernel=(case.kernel, case.kernel), dtype=dtype, device=device, channels_last=channels_last
    )
    found: dict[str, tuple[Way, Way]] = {"torch": (partial(_torch, case, False), partial(_torch, case, True))}
    for backend in BACKENDS:
        # on a GPU, aten is torch's own convolution, and measured takes the fastest of the other ways
        if backend.name in ("aten", "measured", reference.BACKEND.name) or backend.refusal(call) is not None:
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


def truth_of(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[list[int], tuple[Tensor | None, ...]]:
    """Some channels, with the first and the last, and their y, dx and dw in float64."""
    c = x.shape[1]
    # float64 products of all channels would take longer than everything else
    chosen = sorted({0, c // 3, c // 2, c - 1})
    part = [t[:, chosen].double() for t in (dy, x)]
    inner = weight[chosen].double()
    y = reference.forward(part[1], inner, None, False)
    dx, dw, _ = reference.backward(part[0], part[1], inner, [True, True, False])
    return chosen, (y, dx, dw)


def error_of(found: tuple[Tensor | None, ...], truth: tuple[list[int], tuple[Tensor | None, ...]]) -> float:
    """The largest relative L2 error of y, dx and dw in a chosen channel."""
    chosen, expected = truth
    errors = []
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got is not None
        assert want is not None
        errors.append(image_error(got, chosen, want) if i < 2 else weight_error(got, chosen, want))
    return max(errors)


def image_error(got: Tensor, chosen: list[int], want: Tensor) -> float:
    """The largest relative L2 error of y or dx `[N,C,H,W]`; `want` has the chosen channels only."""
    return _largest_error(got[:, chosen], want, (0, 2, 3))


def weight_error(got: Tensor, chosen: list[int], want: Tensor) -> float:
    """The largest relative L2 error of dw `[C,1,Kh,Kw]`; `want` has the chosen channels only."""
    return _largest_error(got[chosen], want, (1, 2, 3))


def _largest_error(got: Tensor, want: Tensor, axes: tuple[int, ...]) -> float:
    errors = torch.linalg.vector_norm(got.double() - want, dim=axes) / torch.linalg.vector_norm(want, dim=axes)
    return errors.max().item() if errors.isfinite().all() else float("inf")
