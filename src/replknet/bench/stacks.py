"""Table 1 of the paper: what a stack of 24 depthwise layers costs as its kernels grow, the operator against torch.

All kernels and ways of one resolution are timed in turns in one process, so their ratios can be trusted. A way whose
result misses float64 gets no time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.bench.cases import Case
from replknet.bench.ops import Operator, Wrong
from replknet.kernels import choose, forced, reference, triton, use_backend
from replknet.ops import depthwise_conv2d
from replknet.ops.call import call_of
from replknet.timing import Timing, interleaved

Way = Literal["operator nhwc", "torch nhwc", "operator nchw", "torch nchw", "triton nhwc", "triton nchw"]
# ways on every device, and further ways on a GPU: the Triton kernels by force
WAYS: tuple[Way, ...] = ("torch nhwc", "torch nchw", "operator nhwc", "operator nchw")
ON_GPU: tuple[Way, ...] = ("triton nhwc", "triton nchw")
KERNELS = (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
RESOLUTIONS = (16, 32, 64)
LAYERS = 24
CHANNELS = 384
# channels, and images, that are checked in float64, with the first and the last
_CHECKED = 4
# allowed error of a layer's sums or transforms, in units of float32's eps
_SUMS = 4.0


def _row(*times_ms: float) -> dict[int, float]:
    return dict(zip(KERNELS, times_ms, strict=True))


# Ding et al. 2022, arXiv:2203.06717, Table 1, repeated in the journal version, arXiv:2410.08049. Kernel side -> ms, for
# 64 images in float32 on a 2080Ti with PyTorch 1.9 and cuDNN 7.6. "ours" is the authors' convolution
PAPER_TABLE_1: dict[tuple[int, Literal["PyTorch", "ours"]], dict[int, float]] = {
    (16, "PyTorch"): _row(5.6, 11.0, 14.4, 17.6, 36.0, 57.2, 83.4, 133.5, 150.7, 171.4),
    (16, "ours"): _row(5.6, 6.5, 6.4, 6.9, 7.5, 8.4, 8.4, 8.4, 8.3, 8.4),
    (32, "PyTorch"): _row(21.9, 34.1, 54.8, 76.1, 141.2, 230.5, 342.3, 557.8, 638.6, 734.8),
    (32, "ours"): _row(21.9, 28.7, 34.6, 40.6, 52.5, 64.5, 73.9, 87.9, 92.7, 96.7),
    (64, "PyTorch"): _row(69.6, 141.2, 228.6, 319.8, 600.0, 977.7, 1454.4, 2371.1, 2698.4, 3090.4),
    (64, "ours"): _row(69.6, 112.6, 130.7, 152.6, 199.7, 251.5, 301.0, 378.2, 406.0, 431.7),
}


@dataclass(frozen=True)
class StackTime:
    """The time of one call of a whole stack."""

    kernel: int  # side, pixels
    way: Way
    timing: Timing
    multiply_adds: int  # of the whole stack and batch, padding included
    backend: str  # who computed
    excess: float  # error as a multiple of what is allowed


def measure(
    resolution: int,
    kernels: Sequence[int] = KERNELS,
    batch: int = 1,
    *,
    layers: int = LAYERS,
    channels: int = CHANNELS,
    ways: Sequence[Way] | None = None,
    runs: int = 20,
    limit_s: float = 20.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[StackTime | Wrong]:
    """Time stacks of depthwise layers; each layer has its own weights and takes the result of the layer before it.

    Args:
        resolution: side of the maps, pixels.
        kernels: sides of the kernels, pixels, odd; one stack each.
        batch: number of images; the paper has 64.
        layers: number of layers in a stack.
        channels: channels of every layer.
        ways: ways to compare: who computes, and the memory format. None for `WAYS`, and on a CUDA device also for the
            ways in `ON_GPU` that take every stack. On a CPU, torch's contiguous convolution takes seconds for large
            kernels.
        runs: rounds, at least 2.
        limit_s: a stack of one way that has taken this many seconds sits out after three rounds.
        device: "cpu" or "cuda". On CUDA, torch's float32 convolutions may use TF32, which is refused as wrong: set
            `torch.backends.cudnn.conv.fp32_precision = "ieee"` before.
        dtype: dtype of values and weights.

    Returns:
        One entry a kernel and way: first the wrong ways, then the times, kernel by kernel.

    Raises:
        ValueError: there is no way of that name.
        RuntimeError: a Triton way was asked for by name and does not take a stack.
    """
    for way in ways or ():
        if way not in get_args(Way):
            raise ValueError(f"no way is called {way!r}; there are {', '.join(get_args(Way))}")
    x = torch.randn(batch, channels, resolution, resolution, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    # one tensor for all stacks: at the paper's largest size it has 400 MB
    last = x.contiguous(memory_format=torch.channels_last)
    stacks = [_stack(x, last, kernel, layers) for kernel in kernels]
    if ways is None:
        ways = WAYS + (tuple(way for way in ON_GPU if _triton_takes(way, stacks)) if device == "cuda" else ())
    runs_of: dict[str, _Run] = {}
    wrong: list[Wrong] = []
    for stack in stacks:
        truth = _truth(stack)
        for way in ways:
            run = _run_of(stack, way, truth)
            if run.excess <= 1:
                runs_of[f"{stack.case.kernel} {way}"] = run
            else:
                wrong.append(Wrong(stack.case.name, "forward", way, run.excess))
    times = interleaved({name: run.call for name, run in runs_of.items()}, runs, limit_s)
    return [
        *wrong,
        *(
            StackTime(
                kernel=run.stack.case.kernel,
                way=run.way,
                timing=times[name],
                multiply_adds=layers * run.stack.case.flops // 2,
                backend=run.backend,
                excess=round(run.excess, 3),
            )
            for name, run in runs_of.items()
        ),
    ]


@dataclass(frozen=True)
class _Stack:
    case: Case  # of each layer
    x: Tensor
    last: Tensor  # x in channels_last
    weights: list[Tensor]

    def images(self, way: Way) -> Tensor:
        return self.last if way.endswith("nhwc") else self.x


@dataclass(frozen=True)
class _Run:
    stack: _Stack
    way: Way
    call: Callable[[], Tensor]
    backend: str
    excess: float


def _stack(x: Tensor, last: Tensor, kernel: int, layers: int) -> _Stack:
    """A stack with weights that give every channel of every layer's result a mean square of one."""
    generator = torch.Generator().manual_seed(kernel)
    weights = []
    y = x.float()
    for _ in range(layers):
        weight = torch.randn(x.shape[1], 1, kernel, kernel, generator=generator).to(x.device)
        y = depthwise_conv2d(y, weight)
        size = y.square().mean((0, 2, 3)).sqrt()[:, None, None]
        y = y / size
        weights.append((weight / size[..., None]).to(x.dtype))
    n, c, h, w = x.shape
    return _Stack(Case(f"stack.n{n}.r{h}.k{kernel}", (n, c, h, w), kernel), x, last, weights)


def _triton_takes(way: Way, stacks: Sequence[_Stack]) -> bool:
    calls = (call_of(stack.images(way), stack.weights[0]) for stack in stacks)
    return all(triton.BACKEND.refusal(call) is None for call in calls)


def _run_of(stack: _Stack, way: Way, truth: Tensor) -> _Run:
    x = stack.images(way)
    who = way.split()[0]
    backend = triton.BACKEND.name if who == "triton" else forced()
    call = partial(_result, _torch if who == "torch" else depthwise_conv2d, backend, x, stack.weights)
    if who == "operator":
        who = choose(call_of(x, stack.weights[0])).name
    return _Run(stack, way, call, who, _excess(stack, call(), truth))


def _result(operator: Operator, backend: str | None, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    with use_backend(backend):
        for weight in weights:
            x = operator(x, weight)
    return x


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def _part(x: Tensor) -> Tensor:
    """Some images and channels, with the first and the last, in float64."""
    for axis in (0, 1):
        chosen = torch.linspace(0, x.shape[axis] - 1, min(x.shape[axis], _CHECKED)).round().long()
        x = x.index_select(axis, chosen.to(x.device))
    return x.double()


def _truth(stack: _Stack) -> Tensor:
    y = _part(stack.x)
    for weight in stack.weights:
        y = reference.forward(y, _part(weight.transpose(0, 1)).transpose(0, 1), None, False)
    return y


def _excess(stack: _Stack, found: Tensor, truth: Tensor) -> float:
    """The largest relative L2 error of a channel, as a multiple of the allowed error.

    Each layer may round its result and may have the error of sums or Fourier transforms in float32. The errors of all
    layers add up.
    """
    if found.shape != stack.x.shape or not found.isfinite().all():
        return math.inf
    error = (_part(found) - truth).flatten(2).norm(dim=2) / truth.flatten(2).norm(dim=2)
    unit = torch.finfo(found.dtype).eps + _SUMS * torch.finfo(torch.float32).eps
    return error.max().item() / (unit * len(stack.weights))
