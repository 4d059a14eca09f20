"""Whole networks before and after: timm's before and after `accelerate`, ours on `aten` and on the chosen backend."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replknet.bench.ops import Found, Wrong
from replknet.bench.records import Record
from replknet.kernels import use_backend
from replknet.nn import accelerate
from replknet.timing import Load, interleaved

# a relative L2 difference of the logits, before and after, up to this counts as rounding
_BOUND = 1e-4


@dataclass(frozen=True)
class Network:
    """One network at work: images `[batch,3,size,size]`, and what "before" means.

    "torch": before is timm's network, after is the network after `accelerate`. "aten": before is our network with this
    backend forced, after is our network with the automatic choice.
    """

    name: str
    model: str
    batch: int
    size: int
    what: Literal["forward", "training step"]
    before: Literal["torch", "aten"]


NETWORKS = (
    Network("convnext_tiny.forward", "convnext_tiny", 1, 224, "forward", "torch"),
    Network("convnext_tiny.step", "convnext_tiny", 8, 224, "training step", "torch"),
    Network("31b.step", "replknet_31b", 8, 224, "training step", "aten"),
    Network("31b.step.n2", "replknet_31b", 2, 224, "training step", "aten"),
    Network("cifar_l.step", "replknet_cifar_l", 128, 32, "training step", "aten"),
)


def measure(networks: list[Network], runs: int, limit_s: float) -> Iterator[list[Found]]:
    """For each network: one record for each way, before and after in both layouts, or what is wrong with it."""
    for network in networks:
        yield _measure(network, runs, limit_s)


def _measure(network: Network, runs: int, limit_s: float) -> list[Found]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(network.batch, 3, network.size, network.size, generator=generator)
    original = timm.create_model(network.model, num_classes=1000)
    ways: dict[str, tuple[nn.Module, str | None, Tensor]] = {}
    for layout, memory_format in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        images = x.contiguous(memory_format=memory_format)
        before = deepcopy(original).to(memory_format=memory_format)
        after = before
        if network.before == "torch":
            after = deepcopy(before)
            accelerate(after)
        ways[f"before {layout}"] = before, "aten" if network.before == "aten" else None, images
        ways[f"after {layout}"] = after, None, images
    wrong: list[Found] = []
    with torch.inference_mode():
        truth = original.eval()(x)
        for name, (model, backend, images) in list(ways.items()):
            with use_backend(backend):
                found = model.eval()(images)
            error = ((found - truth).norm() / truth.norm()).item() / _BOUND
            if not error <= 1:
                wrong.append(Wrong(network.name, network.what, name, error))
                del ways[name]
    load = Load()
    calls = {name: _call(network, *way) for name, way in ways.items()}
    times = interleaved(calls, runs, limit_s)
    disturbed = load.end()
    return wrong + [
        Record(
            suite="networks",
            case=network.name,
            shape=tuple(x.shape),
            kernel=None,
            what=network.what,
            way=name,
            backend=network.before if name.startswith("before") else "operator",
            timing=timing,
            load=disturbed,
        )
        for name, timing in times.items()
    ]


def _call(network: Network, model: nn.Module, backend: str | None, x: Tensor) -> Callable[[], Any]:
    if network.what == "forward":
        return partial(_forward, model.eval(), backend, x)
    labels = torch.arange(network.batch) % 1000
    # the simplest optimiser: we do not measure its time and memory
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    return partial(_step, model, backend, x, labels, optimizer)


def _forward(model: nn.Module, backend: str | None, x: Tensor) -> None:
    with use_backend(backend), torch.inference_mode():
        model(x)


def _step(model: nn.Module, backend: str | None, x: Tensor, labels: Tensor, optimizer: torch.optim.SGD) -> None:
    model.train()
    with use_backend(backend):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()
