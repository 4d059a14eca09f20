"""Where the time of an inference form goes: what each kind of layer takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replknet.deploy.inference import Optimized
from replknet.deploy.inference_layers import Convolution, Depthwise, Product
from replknet.deploy.winograd import Winograd


@dataclass(frozen=True)
class Part:
    """The time that one kind of layer takes in our inference form.

    Args:
        kind: kind of layer.
        calls: number of its calls in a run.
        ms: time of all its calls in a run, ms; median over the runs.
        multiply_adds: multiply-adds as the layers define them, padding included.
        bound_ms: time of these multiply-adds at the rate of the fastest matrix product, ms.
    """

    kind: str
    calls: int
    ms: float
    multiply_adds: int
    bound_ms: float


def parts(optimized: Optimized, x: Tensor, runs: int = 7) -> list[Part]:
    """The time of each kind of layer in an inference form, the slowest first, then the rest and the total.

    Args:
        optimized: an inference form that is not compiled.
        x: images `[N,3,H,W]`.
        runs: number of runs; times are their medians.

    Raises:
        ValueError: the form is compiled, so it has no layers to time.
    """
    if optimized.report.compiled:
        raise ValueError("a compiled network has no layers that could be timed: optimize it with compile=False")
    network = optimized.network
    rate = product_rate()
    watch = _Watch()
    found: list[dict[str, float]] = []
    assert isinstance(network, nn.Module)
    with watch.on(network):
        for _ in range(runs + 1):
            watch.clear()
            begin = _now()
            optimized(x)
            watch.ms["everything"] = _now() - begin
            found.append(dict(watch.ms))
    middle = {kind: sorted(run[kind] for run in found[1:])[runs // 2] for kind in watch.ms}
    rest = middle["everything"] - sum(ms for kind, ms in middle.items() if kind != "everything")
    listed = [
        Part(kind, watch.calls[kind], ms, watch.macs[kind], watch.macs[kind] / rate / 1e6)
        for kind, ms in middle.items()
        if kind != "everything"
    ]
    listed.sort(key=lambda part: -part.ms)
    total = sum(part.multiply_adds for part in listed)
    return [
        *listed,
        Part("copies, sums and Python", 0, rest, 0, 0.0),
        Part("everything", 1, middle["everything"], total, total / rate / 1e6),
    ]


def product_rate() -> float:
    """Rate of the fastest of 21 large matrix products in float32, 10**9 multiply-adds a second."""
    product, rows = Product(torch.randn(1024, 1024), None, 1024), torch.randn(1024, 1024)
    with torch.inference_mode():
        best = min(_timed(partial(product, rows)) for _ in range(21))
    return 1024**3 / best / 1e6


def _now() -> float:
    return 1e3 * time.perf_counter()


def _timed(call: Callable[[], Any]) -> float:
    begin = _now()
    call()
    return _now() - begin


class _Watch:
    """Times the innermost layers of a network, so that no time counts twice."""

    def __init__(self) -> None:
        self._begin = 0.0
        self.clear()

    def clear(self) -> None:
        self.ms: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.macs: dict[str, int] = {}

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        hooks = []
        for layer in _leaves(network):
            hooks.append(layer.register_forward_pre_hook(self._start))
            hooks.append(layer.register_forward_hook(self._stop))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _start(self, layer: nn.Module, inputs: Any) -> None:
        self._begin = _now()

    def _stop(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        spent = _now() - self._begin
        kind, macs = _kind(layer, inputs[0], output)
        self.ms[kind] = self.ms.get(kind, 0.0) + spent
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.macs[kind] = self.macs.get(kind, 0) + macs


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, Product | Depthwise | Convolution | Winograd) or not list(module.children()):
        yield module
        return
    for child in module.children():
        yield from _leaves(child)


def _kind(layer: nn.Module, x: Tensor, y: Any) -> tuple[str, int]:
    """The kind of a layer, and its multiply-adds."""
    if isinstance(layer, Product):
        return "1x1 convolutions", x.shape[0] * layer.inputs * layer.outputs
    if isinstance(layer, Winograd):
        return "3x3 convolutions by Winograd's method", 9 * y.numel() * x.shape[1]
    conv = getattr(layer, "conv", layer)
    if isinstance(conv, nn.Conv2d):
        taps = conv.weight[0].numel()
        kind = "depthwise convolutions" if conv.groups > 1 else "other convolutions"
        return kind, y.numel() * taps
    return "norms, pooling and classifier", y.numel() * x.shape[-1] if isinstance(layer, nn.Linear) else 0
