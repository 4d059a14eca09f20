"""What a call of the operator costs beyond torch's own convolution, on an image so small that the rest costs little.

For the GPU kernels it is the host's time of a call. No GPU is needed: the launches do nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet import kernels
from replknet.bench.ops import Found
from replknet.bench.records import Record
from replknet.kernels import choose, triton, triton_run
from replknet.kernels.triton_choice import Choice
from replknet.ops import depthwise_conv2d
from replknet.ops.call import call_of
from replknet.timing import Load, Timing, interleaved

SHAPE = (1, 16, 4, 4)
KERNELS = {"overhead.k3": 3, "overhead.k5": 5}
TARGET_US = 15.0
GPU = "overhead.gpu"
GPU_SHAPE = (1, 16, 16, 16)
GPU_KERNEL = 13
# time of the host; under autocast the time of torch's own casts comes on top
GPU_TARGETS_US = {"forward": 25.0, "step": 60.0, "autocast step": 60.0}
CASES = [*KERNELS, GPU]
# calls in one timing, since reading the clock takes a tenth of a microsecond
_CALLS = 200


def measure(names: list[str], runs: int) -> Iterator[list[Found]]:
    """For each case, with and without gradients recorded: the time of one call."""
    for name in names:
        if name == GPU:
            yield from _measure_host(runs)
            continue
        for recorded in (False, True):
            yield _measure(name, recorded, runs)


def _measure(name: str, recorded: bool, runs: int) -> list[Found]:
    k = KERNELS[name]
    weight = torch.randn(SHAPE[1], 1, k, k, requires_grad=recorded)
    calls: dict[str, Callable[[], Any]] = {}
    backends = {}
    for layout, memory_format in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        x = torch.randn(SHAPE).contiguous(memory_format=memory_format).requires_grad_(recorded)
        calls[f"operator {layout}"] = partial(depthwise_conv2d, x, weight)
        calls[f"torch {layout}"] = partial(conv2d, x, weight, padding=k // 2, groups=SHAPE[1])
        backends[f"operator {layout}"] = choose(call_of(x, weight)).name
    load = Load()
    with torch.set_grad_enabled(recorded):
        times = interleaved({way: partial(_often, call) for way, call in calls.items()}, runs)
    disturbed = load.end()
    return [
        Record(
            suite="overhead",
            case=name,
            shape=SHAPE,
            kernel=k,
            what="forward, recorded" if recorded else "forward",
            way=way,
            backend=backends.get(way, "torch"),
            timing=_of_one(timing),
            load=disturbed,
        )
        for way, timing in times.items()
    ]


def _measure_host(runs: int) -> Iterator[list[Found]]:
    """Host times of calls that would go to a GPU in bfloat16, in both layouts."""
    calls: dict[str, dict[str, Callable[[], Any]]] = {what: {} for what in GPU_TARGETS_US}
    for layout, memory_format in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        x = torch.randn(GPU_SHAPE).contiguous(memory_format=memory_format)
        weight, bias = torch.randn(GPU_SHAPE[1], 1, GPU_KERNEL, GPU_KERNEL), torch.randn(GPU_SHAPE[1])
        tensors = [t.requires_grad_() for t in (x, weight, bias)]
        low = [t.detach().bfloat16().requires_grad_() for t in tensors]
        dy = torch.randn_like(low[0])
        calls["forward"][f"host {layout}"] = partial(_forward, *low)
        calls["step"][f"host {layout}"] = partial(_step, low, dy)
        calls["autocast step"][f"host {layout}"] = partial(_autocast_step, tensors, dy)
        calls["autocast step"][f"casts {layout}"] = partial(_casts, tensors, low)
    for what, ways in calls.items():
        load = Load()
        with without_launches():
            times = interleaved({way: partial(_often, call) for way, call in ways.items()}, runs)
        disturbed = load.end()
        yield [
            Record(
                suite="overhead",
                case=GPU,
                shape=GPU_SHAPE,
                kernel=GPU_KERNEL,
                what=what,
                way=way,
                backend="triton" if way.startswith("host") else "torch",
                timing=_of_one(timing),
                load=disturbed,
            )
            for way, timing in times.items()
        ]


@contextmanager
def without_launches() -> Iterator[None]:
    """Every CPU call runs the host code of the Triton kernels. Launches do nothing, so results are uninitialised."""
    from replknet.kernels.triton_launch import Launch

    def first(self: Any, tensors: object) -> None:
        # str.format stands for the launcher: it takes any arguments and returns at once
        self._direct = "".format, 0, None, lambda device: 0, -1

    choice, before, plain = Choice(measured=False), kernels.BACKENDS, Launch._first
    backend = replace(
        triton.BACKEND, refusal=lambda call: None, automatic=True, forward=choice.forward, backward=choice.backward
    )
    # both are restored below
    kernels.BACKENDS = (backend,)
    Launch._first = first  # type: ignore[method-assign]
    try:
        yield
    finally:
        kernels.BACKENDS = before
        Launch._first = plain  # type: ignore[method-assign]
        # the cached runs have launches that do nothing
        for cache in (triton_run.run_of, triton_run.gradient_of):
            cache.cache_clear()


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    with torch.inference_mode():
        depthwise_conv2d(x, weight, bias)


def _step(tensors: list[Tensor], dy: Tensor) -> None:
    x, weight, bias = tensors
    torch.autograd.grad(depthwise_conv2d(x, weight, bias), tensors, dy)


def _autocast_step(tensors: list[Tensor], dy: Tensor) -> None:
    x, weight, bias = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv2d(x, weight, bias)
    torch.autograd.grad(y, tensors, dy)


def _casts(tensors: list[Tensor], low: list[Tensor]) -> None:
    """Torch's casts for autocast and the gradients of these casts, without a convolution."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [t.to(torch.bfloat16) for t in tensors]
    torch.autograd.grad(cast, tensors, low)


def _often(call: Callable[[], Any]) -> None:
    for _ in range(_CALLS):
        call()


def _of_one(timing: Timing) -> Timing:
    return replace(timing, p20_ms=timing.p20_ms / _CALLS, p50_ms=timing.p50_ms / _CALLS, p80_ms=timing.p80_ms / _CALLS)
