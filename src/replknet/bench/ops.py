"""The depthwise benchmark: the operator against torch's own convolution and other runtimes.

A result that misses the float64 reference prints its error and gets no time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.bench import runtimes
from replknet.bench.cases import Case, Stack, Suite, What
from replknet.bench.gate import excess, truths
from replknet.bench.records import Record
from replknet.kernels import BACKENDS, Backend, choose, native, native_core, use_backend
from replknet.ops import depthwise_conv2d
from replknet.ops.call import call_of
from replknet.timing import Load, interleaved

# x, weight -> y
Operator = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[], Any]  # returns new tensors


@dataclass(frozen=True)
class Wrong:
    """A way whose result misses the reference; it is not timed."""

    case: str
    what: str
    way: str
    excess: float


Found = Record | Wrong


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds, seconds a way, the FMA peak in GFLOP/s with its source, and patterns of way names."""

    runs: int
    limit_s: float
    peak_gflops: float
    peak_from: str
    ways: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Layer:
    """The tensors of one case, in both layouts."""

    case: Case
    nchw: tuple[Tensor, Tensor, Tensor]  # x, weight, dy
    nhwc: tuple[Tensor, Tensor, Tensor]

    def tensors(self, layout: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.nhwc if layout == "nhwc" else self.nchw


@dataclass(frozen=True)
class Way:
    """One way of computing every layer of a workload."""

    name: str
    backend: str  # who computes
    calls: tuple[Call, ...]  # one a layer

    def run(self) -> None:
        for call in self.calls:
            call()


def measure(
    name: str, suite: Suite, cases: Sequence[Case | Stack], whats: Sequence[What], settings: Settings
) -> Iterator[list[Found]]:
    """For each workload and each of `whats`: one record for each way, or what is wrong with it."""
    for case in cases:
        layers = _layers(case)
        for what in whats:
            yield _measure(name, case, what, layers, settings, suite.runtimes and what == "forward")
        # free them before the next workload: the largest tensors have 400 MB
        del layers


def _measure(
    suite: str, case: Case | Stack, what: What, layers: list[Layer], settings: Settings, others: bool
) -> list[Found]:
    ways = _ways(what, layers)
    if others:
        ways += _runtimes(layers)
    names = ", ".join(way.name for way in ways)
    ways = [way for way in ways if any(fnmatchcase(way.name, pattern) for pattern in settings.ways)]
    if not ways:
        raise ValueError(f"no way of {case.name} is called {', '.join(settings.ways)}; there are {names}")
    excesses = _excesses(what, layers, ways)
    wrong: list[Found] = [Wrong(case.name, what, way, e) for way, e in excesses.items() if not e <= 1]
    right = {way.name: way for way in ways if excesses[way.name] <= 1}
    load = Load()
    calls = {way.name: way.calls[0] if len(way.calls) == 1 else way.run for way in right.values()}
    apart = [way for way in calls if right[way].backend in runtimes.NAMES]
    times = interleaved(calls, settings.runs, settings.limit_s, apart)
    disturbed = load.end()
    # dx and dw each take as many products as y
    factor = {"forward": 1, "gradients": 2, "step": 3}[what]
    return wrong + [
        Record(
            suite=suite,
            case=case.name,
            shape=case.shape if isinstance(case, Case) else None,
            kernel=case.kernel if isinstance(case, Case) else None,
            what=what,
            way=way,
            backend=right[way].backend,
            timing=timing,
            excess=round(excesses[way], 3),
            flops=factor * case.flops,
            useful_flops=factor * case.useful_flops,
            peak_gflops=settings.peak_gflops,
            peak_from=settings.peak_from,
            load=disturbed,
        )
        for way, timing in times.items()
    ]


def _layers(case: Case | Stack) -> list[Layer]:
    found = []
    generator = torch.Generator().manual_seed(0)
    for layer in case.layers:
        x, dy = (torch.randn(layer.shape, generator=generator) for _ in range(2))
        weight = torch.randn(layer.shape[1], 1, layer.kernel, layer.kernel, generator=generator) / layer.kernel
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dy)]
        found.append(Layer(layer, (x, weight, dy), (last[0], weight, last[1])))
    return found


def _excesses(what: What, layers: list[Layer], ways: list[Way]) -> dict[str, float]:
    """For each way, its largest error over all layers as a multiple of the bound."""
    found = dict.fromkeys((way.name for way in ways), 0.0)
    for i, layer in enumerate(layers):
        expected = truths(layer.case, what, *layer.nchw, share=1 / len(layers))
        for way in ways:
            result = way.calls[i]()
            results = result if isinstance(result, tuple) else (result,)
            tensors = [torch.as_tensor(t) for t in results[: len(expected)]]
            found[way.name] = max(found[way.name], excess(expected, tensors))
    return found


def _ways(what: What, layers: list[Layer]) -> list[Way]:
    """Torch, the operator's own choice, and every other backend and instruction set by force, in both layouts."""
    layouts = ("nhwc", "nchw")
    # torch goes first: its long calls wake the processor and the threads for the operator
    ways = [
        Way(f"torch {layout}", "torch", tuple(_call(what, _torch, *layer.tensors(layout)) for layer in layers))
        for layout in layouts
    ]
    for layout in layouts:
        tensors = [layer.tensors(layout) for layer in layers]
        calls = [call_of(x, weight) for x, weight, _ in tensors]
        taken = sorted({choose(call).name for call in calls})
        ours = tuple(_call(what, depthwise_conv2d, *t) for t in tensors)
        ways.append(Way(f"operator {layout}", "+".join(taken), ours))
        for backend in BACKENDS:
            accepts = all(backend.refusal(call) is None for call in calls)
            if backend.automatic and accepts and taken != [backend.name]:
                by_force = tuple(partial(_forced, backend, call) for call in ours)
                ways.append(Way(f"{backend.name} {layout}", backend.name, by_force))
        for isa in _other_sets() if taken == [native.BACKEND.name] else ():
            ways.append(Way(f"{isa} {layout}", native.BACKEND.name, tuple(partial(_with_set, isa, c) for c in ours)))
    return ways


def _runtimes(layers: list[Layer]) -> list[Way]:
    threads = torch.get_num_threads()
    return [
        Way(name, name, tuple(prepare(layer.nchw[0], layer.nchw[1], threads) for layer in layers))
        for name, prepare in runtimes.installed().items()
    ]


def _forced(backend: Backend, call: Call) -> Any:
    with use_backend(backend.name):
        return call()


def _other_sets() -> list[str]:
    """Instruction sets of the native kernel that run here and were not chosen, except `plain`, which needs no set."""
    names = [name for name, runs in native_core.instruction_sets().items() if runs and name != "plain"]
    return [name for name in names if name != native_core.instruction_set()]


def _with_set(isa: str, call: Call) -> Any:
    with native_core.use_instruction_set(isa):
        return call()


def _call(what: What, operator: Operator, x: Tensor, weight: Tensor, dy: Tensor) -> Call:
    if what == "forward":
        return partial(operator, x, weight)
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    if what == "step":
        return partial(_step, operator, leaves, dy)
    return partial(torch.autograd.grad, operator(*leaves), leaves, dy, retain_graph=True)


def _step(operator: Operator, leaves: tuple[Tensor, Tensor], dy: Tensor) -> Any:
    """dx and dw through autograd, the forward pass included."""
    return torch.autograd.grad(operator(*leaves), leaves, dy)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])
