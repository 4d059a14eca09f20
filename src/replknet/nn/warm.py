"""Compiles and times ahead everything that a model's first step on a GPU would compile and time."""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from replknet.kernels.triton_choice import MEASURED, Question
from replknet.kernels.triton_device import device_at
from replknet.kernels.triton_tune import patience


@dataclass(frozen=True)
class Way:
    """The decision for one direction of one kind of calls; no tile and no times where nothing may be timed."""

    kind: str  # direction, N,C,H,W, kernel, dtype and layout
    tile: str | None  # Triton's fastest; None if the device can run none
    ms: float | None
    torch_ms: float | None


@dataclass(frozen=True)
class Warmed:
    """Result of `warm`: `str()` is for people, `asdict()` for programs."""

    seconds: float
    ways: list[Way]

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.ways:
            return "nothing to do: no call of the operator went to a CUDA device"
        lines = [f"{len(self.ways)} kinds of calls in {self.seconds:.1f} s; ms of Triton's kernels and of torch"]
        lines += [f"{_ms(way.ms)} {_ms(way.torch_ms)}  {way.kind}" for way in self.ways]
        return "\n".join(lines)


def _ms(ms: float | None) -> str:
    return f"{'-':>9}" if ms is None else f"{ms:9.3f}"


def warm(model: nn.Module, example: Any, backward: bool | None = None) -> Warmed:
    """Compile and time ahead what the first step of a model on a GPU would compile and time.

    The model runs twice, in its own mode, under the caller's autocast and grad mode. Between the two runs all kernels
    are compiled, as many at once as there are processors. Afterwards the model, its gradients and torch's random
    numbers are as before. The results stay on disk for later processes on this device (`replknet.doctor()` shows
    where).

    Args:
        model: a model on a CUDA device; on another device there is nothing to do.
        example: what the model is called with: a tuple of arguments, a mapping of keyword arguments, or one argument.
            Give it the shapes and dtypes of the steps to come.
        backward: whether gradients are computed, too. By default they are, if the model is in training mode and torch
            records gradients.

    Returns:
        The kinds of calls that the model made, with the times of Triton's kernels and of torch's own convolution.

    Raises:
        ValueError: gradients are wanted, but no output of the model has one.
    """
    if backward is None:
        backward = model.training and torch.is_grad_enabled()
    start = time.monotonic()
    with _unchanged(model):
        with MEASURED.noting() as questions:
            _step(model, example, backward)
        asked = list(questions)
        with patience.spending():
            _compile(asked)
        _step(model, example, backward)
    ways = [_way(question) for question in asked]
    return Warmed(time.monotonic() - start, sorted(ways, key=lambda way: way.kind))


def _step(model: nn.Module, example: Any, backward: bool) -> None:
    if isinstance(example, Mapping):
        found = model(**example)
    else:
        found = model(*example) if isinstance(example, tuple) else model(example)
    if not backward:
        return
    outputs = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise ValueError("no output of the model has a gradient; backward=False warms only the forward pass")
    torch.stack([t.float().sum() for t in outputs]).sum().backward()


def _compile(questions: list[Question]) -> None:
    """Compile all tiles that may be tried, in threads: the compilers let other threads run."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = []
        for question in questions:
            for tile in question.wanted_tiles():
                device_at(question.work.device).compiled.add((question.kind, tile))
                jobs.append(pool.submit(question.compile, tile))
        # a tile that cannot be compiled raises its error when it is called
        wait(jobs)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers and gradients, and torch's random numbers, are as before."""
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            for p in model.parameters():
                p.grad = None
            yield
    finally:
        with torch.no_grad():
            for name, t in model.named_buffers():
                t.copy_(buffers[name])
        for name, p in model.named_parameters():
            p.grad = gradients[name]


def _way(question: Question) -> Way:
    device = device_at(question.work.device)
    entry = device.table[question.kind] if device.may_time() else None
    if entry is None:
        return Way(question.kind, None, None, None)
    return Way(question.kind, None if entry.tile is None else str(entry.tile), entry.ms, entry.torch_ms)
