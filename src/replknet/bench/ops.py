"""The depthwise benchmark: the operator against torch's own convolution, forward and backward.

A case whose result misses the float64 reference prints the error and no time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.bench.cases import CASES, Case
from replknet.bench.harness import Record, append, interleaved
from replknet.kernels import reference
from replknet.ops import depthwise_conv2d

# relative L2 error of float32 results that is taken for right; kernels have a sharper bound in their tests
_GATE = 1e-5


def run(names: list[str] | None, runs: int, output: Path | None) -> int:
    """Time the named cases, print a table, and append the records to `output`.

    Returns:
        0, or 1 if a result was wrong.

    Raises:
        ValueError: a case of that name does not exist.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"no case is called {', '.join(unknown)}; there are {', '.join(known)}")
    failed = False
    print(f"{'case':<20} {'what':<10} {'ms':>9} {'torch':>9} {'torch nhwc':>11} {'speed-up':>9}")
    for case in [known[name] for name in names] if names else CASES:
        for what, calls, error in _ways(case):
            if not error <= _GATE:
                print(f"{case.name:<20} {what:<10} wrong by {error:.1e}, not timed")
                failed = True
                continue
            times = interleaved(calls, runs)
            ours, nchw, nhwc = (times[name].p50_ms for name in ("operator", "torch", "torch nhwc"))
            best = min(nchw, nhwc) / ours
            print(f"{case.name:<20} {what:<10} {ours:>9.3f} {nchw:>9.3f} {nhwc:>11.3f} {best:>8.2f}x", flush=True)
            if output is not None:
                append(output, [Record(case=case.name, what=f"{what}, {who}", timing=t) for who, t in times.items()])
    return int(failed)


def _ways(case: Case) -> list[tuple[str, dict[str, Callable[[], Any]], float]]:
    """Forward and backward, each in three ways, and how far the operator's result is from the truth."""
    x, dy = torch.randn(case.shape), torch.randn(case.shape)
    w = torch.randn(case.shape[1], 1, case.kernel, case.kernel) / case.kernel
    x_last, dy_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    pad, groups = case.kernel // 2, case.shape[1]
    # one image is enough to judge by, and the reference is slow
    one = reference.forward(x[:1].double(), w.double(), None, False)
    error_y = _relative(depthwise_conv2d(x_last[:1], w), one)
    _, dw, _ = reference.backward(dy[:1].double(), x[:1].double(), w.double(), [False, True, False])
    assert dw is not None
    error_dw = _relative(_operator_backward(dy_last[:1], x_last[:1], w)[1], dw)
    forward: dict[str, Callable[[], Any]] = {
        "operator": partial(depthwise_conv2d, x_last, w),
        "torch": partial(conv2d, x, w, padding=pad, groups=groups),
        "torch nhwc": partial(conv2d, x_last, w, padding=pad, groups=groups),
    }
    backward: dict[str, Callable[[], Any]] = {
        "operator": partial(_operator_backward, dy_last, x_last, w),
        "torch": partial(_torch_backward, dy, x, w),
        "torch nhwc": partial(_torch_backward, dy_last, x_last, w),
    }
    return [("forward", forward, error_y), ("backward", backward, error_dw)]


def _relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _operator_backward(dy: Tensor, x: Tensor, w: Tensor) -> Any:
    return torch.ops.replknet.depthwise_conv2d_backward(dy, x, w, [True, True, False], "auto")


def _torch_backward(dy: Tensor, x: Tensor, w: Tensor) -> Any:
    p, c = w.shape[-1] // 2, x.shape[1]
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, [1, 1], [p, p], [1, 1], False, [0, 0], c, [True, True, False]
    )
