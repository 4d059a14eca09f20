"""Which way a call on a GPU goes: by Triton's kernels with some tile, or by torch's own convolution.

A decision is kept, so that later calls like the first only look it up. Two objects decide:

- `MEASURED` is the default. It takes the way that is fastest on the device. Where Triton's kernels do not compile, do
  not run, or give wrong numbers, it takes torch's convolution.
- `BY_NAME` serves the backend that is asked for by name. It takes Triton's kernels, and their errors are raised.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from replknet.kernels import aten, prepared
from replknet.kernels.aten import inner, margins
from replknet.kernels.triton_check import check_name, excess
from replknet.kernels.triton_device import Device, device_at, failures
from replknet.kernels.triton_plan import Run, RunGradient, Tile, Work, forward_tiles, gradient_tiles
from replknet.kernels.triton_run import aligned, allows_tf32, both, gradient_of, run_of, work_of
from replknet.kernels.triton_tune import Entry, kind_of, patience, timed

# where nothing may be timed, 16-bit types take patches from this kernel side on: from there on patches won every timed
# case, by 2.9 times and more (docs/results/operator-gpu.md)
_PATCHES_FROM = 13
# map sizes of a layer that get kernels of their own, such as one for training and one for evaluation; others share some
_SIZES = 2
# decisions kept at most
_MOST_RUNS = 4096


@dataclass(frozen=True)
class Question:
    """Which way one direction of a call is to go."""

    direction: str  # "forward", "dx" or "dw"
    work: Work
    kernel: tuple[int, int]  # with the taps that meet only padding; `work` leaves them out
    any_size: bool = False  # whether the layer's maps change in size

    @property
    def kind(self) -> str:
        return kind_of(self.direction, self.work, self.any_size)

    def tiles(self) -> tuple[Tile, ...]:
        """The tiles that may be tried; the first is the shipped one."""
        work, family = self.work, device_at(self.work.device).family
        if self.direction == "dw":
            return gradient_tiles(work.shape, work.kernel, work.dtype, work.tf32, family, self.any_size)
        return forward_tiles(work.shape, work.kernel, work.dtype, work.tf32, work.channels_last, family, self.any_size)

    def wanted_tiles(self) -> tuple[Tile, ...]:
        """The tiles that `MEASURED` would run: all of them if they may be timed, else the shipped one or none."""
        if device_at(self.work.device).may_time():
            return self.tiles()
        return self.tiles()[:1] if _prior(self) else ()

    def compile(self, tile: Tile) -> None:
        """Compile what a tile needs; may be called in any thread."""
        from replknet.kernels.triton_launch import compiling

        n, c, h, w = self.work.shape
        layout = torch.channels_last if self.work.channels_last else torch.contiguous_format
        x = torch.empty((n, c, h, w), dtype=self.work.dtype, device="meta", memory_format=layout)
        weight = torch.empty((c, 1, *self.work.kernel), dtype=x.dtype, device="meta")
        bias = torch.empty(c, dtype=x.dtype, device="meta") if self.work.bias else None
        # device -1, so that calls on the device do not find this run in the cache of `run_of`
        work = replace(self.work, device=-1)
        with torch.cuda.device(self.work.device), compiling():
            if self.direction == "dw":
                gradient_of(tile, work)(x, x)
            else:
                run_of(tile, work)(x, weight, bias)


class WrongNumbers(RuntimeError):
    """A kernel's result differs from the definition."""


class _Broken(RuntimeError):
    """A kind of kernel that failed, and its error."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name = name
        self.error = error


class Choice:
    """Decides the way of calls, and keeps the decisions.

    Args:
        measured: whether torch's convolution is a way, too.
    """

    def __init__(self, measured: bool) -> None:
        self._measured = measured
        self._runs: dict[tuple[object, ...], Run] = {}
        self._gradients: dict[tuple[object, ...], RunGradient] = {}
        self._noted: dict[Question, None] | None = None
        # kind of layer -> the first few map sizes that it saw
        self._sizes: dict[tuple[object, ...], set[tuple[int, int]]] = {}

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "auto") -> Tensor:
        """See `Backend.forward`."""
        with torch.cuda.device_of(x):
            x, weight = aligned(x), aligned(weight)
            if bias is not None:
                bias = aligned(bias.contiguous())
            return self._run("forward", x, weight, bias, relu)(x, weight, bias)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "auto"
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `Backend.backward`."""
        dx = dw = None
        with torch.cuda.device_of(x):
            dy, x, weight = aligned(dy), aligned(x), aligned(weight)
            if wanted[0] and wanted[1]:
                run, gradient = self._run("dx", dy, weight, None, False), self._gradient(dy, x, weight)
                dx, dw = both(run, gradient, dy, x, weight)
            elif wanted[0]:
                dx = self._run("dx", dy, weight, None, False)(dy, weight, None)
            elif wanted[1]:
                dw = self._gradient(dy, x, weight)(dy, x)
            # torch sums 16-bit types in float32
            db = dy.sum((0, 2, 3)) if wanted[2] else None
        return dx, dw, db

    def forget(self) -> None:
        """Drop all decisions."""
        self._runs.clear()
        self._gradients.clear()
        self._sizes.clear()

    @contextmanager
    def noting(self) -> Iterator[dict[Question, None]]:
        """Note the questions of calls inside instead of deciding them; torch's convolution takes these calls."""
        self.forget()
        found: dict[Question, None] = {}
        self._noted = found
        try:
            yield found
        finally:
            self._noted = None
            self.forget()

    def _run(self, direction: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Run:
        key = (direction, bias is None, relu, *_facts(x, weight))
        run = self._runs.get(key)
        if run is None:
            run, final = self._decided_run(direction, x, weight, bias, relu)
            if final:
                _keep(self._runs, key, run)
        return run

    def _gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> RunGradient:
        key = _facts(x, weight)
        run = self._gradients.get(key)
        if run is None:
            run, final = self._decided_gradient(dy, x, weight)
            if final:
                _keep(self._gradients, key, run)
        return run

    def _decided_run(
        self, direction: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> tuple[Run, bool]:
        margin, kernel = _inside(x, weight)
        work = work_of(x, kernel, bias is not None, relu, direction == "dx")
        by_torch: Run = partial(_by_torch, direction, relu)

        def run_with(tile: Tile) -> Run:
            run = run_of(tile, work)
            return partial(_without_margin, run, margin) if any(margin) else run

        question = self._question(direction, work, weight)
        to_come: tuple[str, ...] = ()
        if direction == "forward":
            to_come = tuple(name for name, t in (("dx", x), ("dw", weight)) if t.requires_grad)
        tile, final = self._decided(
            question, lambda tile: run_with(tile)(x, weight, bias), partial(by_torch, x, weight, bias), to_come
        )
        return by_torch if tile is None else run_with(tile), final

    def _decided_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[RunGradient, bool]:
        margin, kernel = _inside(x, weight)
        work = work_of(x, kernel)
        by_torch: RunGradient = partial(_gradient_by_torch, torch.empty_like(weight, device="meta"))

        def run_with(tile: Tile) -> RunGradient:
            run = gradient_of(tile, work)
            return partial(_with_margin, run, margin) if any(margin) else run

        question = self._question("dw", work, weight)
        tile, final = self._decided(question, lambda tile: run_with(tile)(dy, x), partial(by_torch, dy, x))
        return by_torch if tile is None else run_with(tile), final

    def _question(self, direction: str, work: Work, weight: Tensor) -> Question:
        kernel, size = (weight.shape[2], weight.shape[3]), (work.shape[2], work.shape[3])
        sizes = self._sizes.setdefault(
            (direction, work.device, work.shape[1], kernel, work.dtype, work.channels_last), set()
        )
        if len(sizes) < _SIZES:
            sizes.add(size)
        return Question(direction, work, kernel, any_size=size not in sizes)

    def _decided(
        self,
        question: Question,
        run: Callable[[Tile], object],
        torch_run: Callable[[], object],
        to_come: Sequence[str] = (),
    ) -> tuple[Tile | None, bool]:
        """The tile of a call (None: torch's convolution), and whether the decision holds for later calls like it."""
        device = device_at(question.work.device)
        recording = device.recording()
        if self._noted is not None:
            self._noted[question] = None
            return None, False
        if not self._measured:
            return _by_name(question, device, recording, run), not recording
        if recording:
            return None, False
        for direction in to_come:
            _compile_ahead(question, direction, device)
        return _fastest(question, device, run, torch_run), True


MEASURED, BY_NAME = Choice(measured=True), Choice(measured=False)


def _by_name(question: Question, device: Device, recording: bool, run: Callable[[Tile], object]) -> Tile:
    tiles = question.tiles()
    if not device.may_time():
        return tiles[0]
    if recording:
        known = device.table[question.kind]
        return tiles[0] if known is None or known.tile is None else known.tile
    entry = _timed(question, device, tiles, run, None)
    assert entry.tile is not None
    return entry.tile


def _fastest(
    question: Question, device: Device, run: Callable[[Tile], object], torch_run: Callable[[], object]
) -> Tile | None:
    """The fastest way that works; None is torch's convolution."""

    def trusted_run(tile: Tile) -> object:
        """Run a tile after its kind of kernel was compared with the definition."""
        try:
            _compare(question, tile, device)
            return run(tile)
        except failures() as error:
            # not the kernel's fault: the device has fewer resources than others of its family
            if type(error).__name__ == "OutOfResources":
                raise
            raise _Broken(check_name(question.direction, tile, question.work), error) from error

    all_tiles = question.tiles()
    while True:
        tiles = [tile for tile in all_tiles if check_name(question.direction, tile, question.work) not in device.broken]
        if not tiles:
            return None
        try:
            if device.may_time():
                best = _timed(question, device, tiles, trusted_run, torch_run).best
            else:
                best = tiles[0] if _prior(question) and tiles[0] == all_tiles[0] else None
            if best is None:
                return None
            proof = question.kind, question.work.relu, best
            if proof in device.proven:
                return best
            # run it once: a tile from a file may not run here, and a CUDA graph can only record loaded kernels
            if not _fits(trusted_run, best):
                return None
            device.proven.add(proof)
            return best
        except _Broken as broken:
            device.mark(broken.name, broken.error)


@cache
def _background() -> ThreadPoolExecutor:
    # threads are enough: the compilers let other threads run
    return ThreadPoolExecutor(os.cpu_count() or 1)


def _compile_ahead(question: Question, direction: str, device: Device) -> None:
    """Start to compile the shipped tile of a gradient, while the forward pass of the call is compiled and timed."""
    work = replace(question.work, bias=False, relu=False, rotated=direction == "dx")
    gradient = replace(question, direction=direction, work=work)
    for tile in gradient.wanted_tiles()[:1]:
        if (gradient.kind, tile) not in device.compiled:
            device.compiled.add((gradient.kind, tile))
            # an error comes up again when the tile runs
            _background().submit(gradient.compile, tile)


def _prior(question: Question) -> bool:
    """Whether to take patches where nothing may be timed."""
    return question.work.dtype != torch.float32 and min(question.kernel) >= _PATCHES_FROM


def _timed(
    question: Question,
    device: Device,
    tiles: Sequence[Tile],
    run: Callable[[Tile], object],
    torch_run: Callable[[], object] | None,
) -> Entry:
    kind, measured = question.kind, torch_run is not None
    known = device.table.known(kind, measured, tiles)
    if known is not None:
        return known
    # this stream may wait for another process that will want the same lock: finish the stream first
    device.settle()
    with patience.spending(), device.table.alone():
        known = device.table.known(kind, measured, tiles)
        if known is None:
            known = timed(tiles, run, torch_run, question.compile, device.timer)
            device.table.put(kind, known)
        return known


def _compare(question: Question, tile: Tile, device: Device) -> None:
    """Compare a kind of kernel with the definition, once for each device, Triton and torch."""
    name = check_name(question.direction, tile, question.work)
    found = device.table.checks.get(name)
    if found is None:
        times = excess(question.direction, tile, question.work, device.torch_device)
        found = "right" if times <= 1 else f"an error of {times:.1e} times what arithmetic allows"
        device.table.put_check(name, found)
    if found != "right":
        raise WrongNumbers(found)


def _fits(run: Callable[[Tile], object], tile: Tile) -> bool:
    """Run a tile; whether the device has the resources that it needs."""
    from triton.runtime.errors import OutOfResources

    try:
        run(tile)
    except OutOfResources:
        return False
    return True


def _keep(runs: dict[tuple[object, ...], Any], key: tuple[object, ...], run: object) -> None:
    if len(runs) >= _MOST_RUNS:
        runs.clear()
    runs[key] = run


def _facts(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    """The facts about tensors and torch's switches that a decision depends on."""
    return (
        x.shape,
        weight.shape,
        x.dtype,
        x.is_contiguous(),
        x.get_device(),
        torch.are_deterministic_algorithms_enabled(),
        x.dtype is torch.float32 and allows_tf32(),
    )


def _inside(x: Tensor, weight: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns at each edge of the kernel that meet only padding, and the kernel's sides without them."""
    mh, mw = margins(weight, x.shape[2], x.shape[3])
    return (mh, mw), (weight.shape[2] - 2 * mh, weight.shape[3] - 2 * mw)


def _without_margin(run: Run, margin: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    used = inner(weight, *margin).contiguous()
    prepared.share(used, weight)
    return run(x, used, bias)


def _with_margin(run: RunGradient, margin: tuple[int, int], dy: Tensor, x: Tensor) -> Tensor:
    mh, mw = margin
    return pad(run(dy, x), (mw, mw, mh, mh))


def _by_torch(direction: str, relu: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if direction == "forward":
        return aten.forward(x, weight, bias, relu)
    # the gradient does not depend on the values of x
    dx, _, _ = aten.backward(x, x, weight, [True, False, False])
    assert dx is not None
    return dx


def _gradient_by_torch(like: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    weight = torch.empty_like(like, device=x.device)
    return aten.weight_gradient(dy, x, weight)
