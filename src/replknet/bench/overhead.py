"""What a call of the operator costs beyond torch's own convolution, on an image so small that little else is left."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import conv2d

from replknet.bench.harness import Load, Record, Timing, interleaved
from replknet.bench.ops import Found
from replknet.kernels import choose
from replknet.ops import depthwise_conv2d
from replknet.ops.call import call_of

SHAPE = (1, 16, 4, 4)
KERNELS = {"overhead.k3": 3, "overhead.k5": 5}
TARGET_US = 15.0
# one timing is this many calls, since the clock itself costs a tenth of a microsecond
_CALLS = 200


def measure(names: list[str], runs: int) -> Iterator[list[Found]]:
    """For each case, with and without gradients recorded: the time of one call."""
    for name in names:
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


def _often(call: Callable[[], Any]) -> None:
    for _ in range(_CALLS):
        call()


def _of_one(timing: Timing) -> Timing:
    return replace(timing, p20_ms=timing.p20_ms / _CALLS, p50_ms=timing.p50_ms / _CALLS, p80_ms=timing.p80_ms / _CALLS)
