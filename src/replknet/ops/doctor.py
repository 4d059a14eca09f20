"""What this machine can do, and which backend takes which call."""

import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from replknet.kernels import BACKENDS, VARIABLE, Call, choose, forced, measured, native_core, refusals
from replknet.kernels.triton_device import device_at
from replknet.ops.call import call_of

# the large-kernel layers of RepLKNet-31B at 224 pixels: x, kernel
_LAYERS = (
    ((1, 128, 56, 56), (31, 31)),
    ((1, 256, 28, 28), (29, 29)),
    ((1, 512, 14, 14), (27, 27)),
    ((1, 1024, 7, 7), (13, 13)),
)


@dataclass(frozen=True)
class Check:
    """One call, the backend that takes it, and why the others do not."""

    call: str
    backend: str | None
    refusals: dict[str, str | None]


@dataclass(frozen=True)
class Gpu:
    """What is known about one CUDA device."""

    name: str
    capability: str
    refusal: str | None  # why no kernel of ours runs there
    right: list[str]  # kinds of kernels that agreed with the definition
    broken: dict[str, str]  # kinds of kernels that are not used -> why
    table: str  # the file with checks and times
    timed: int  # kinds of calls in the file

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name} (capability {self.capability}): torch's own convolution; Triton: {self.refusal}"
        checked = f"right: {', '.join(self.right)}" if self.right else "no kernel was compared or used yet"
        broken = "".join(f"; not used: {name}: {why}" for name, why in self.broken.items())
        return (
            f"{self.name} (capability {self.capability}): {checked}{broken}; {self.timed} kinds of calls timed in "
            f"{self.table}"
        )


@dataclass(frozen=True)
class Diagnosis:
    """Result of `doctor`: `str()` is for people, `asdict()` for programs."""

    versions: dict[str, str]
    machine: str
    threads: int
    native: str  # how the C++ core runs, or why it does not
    cuda: list[Gpu]
    forced: str | None
    checks: list[Check]

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            "  ".join(f"{name} {found}" for name, found in self.versions.items()),
            f"{self.machine}, {self.threads} torch threads",
            f"native kernel: {self.native}",
            *(f"cuda:{i}: {gpu}" for i, gpu in enumerate(self.cuda)),
            *([] if self.cuda else ["CUDA devices: none"]),
            f"forced backend: {self.forced or 'none'}",
            "",
        ]
        for check in self.checks:
            others = "; ".join(
                f"{name}: {why or 'would take it'}" for name, why in check.refusals.items() if name != check.backend
            )
            lines.append(f"{check.backend or 'none':<10} {check.call}   [{others}]")
        return "\n".join(lines)


def doctor() -> Diagnosis:
    """What this machine can do, and which backend takes which call.

    Returns:
        Versions, processor, threads and the forced backend. For each CUDA device: what was compared and timed there,
        and what is broken. For each large-kernel layer of RepLKNet-31B in float32 (and bfloat16 on CUDA): the backend
        that takes it, and the reasons of the others.

    Raises:
        ValueError: REPLKNET_BACKEND names no backend.
    """
    calls = [
        Call(shape=shape, kernel=kernel, dtype=torch.float32, device="cpu", channels_last=channels_last)
        for shape, kernel in _LAYERS
        for channels_last in (False, True)
    ]
    if torch.cuda.is_available():
        calls += [
            Call(shape=(64, *shape[1:]), kernel=kernel, dtype=dtype, device="cuda")
            for shape, kernel in _LAYERS
            for dtype in (torch.float32, torch.bfloat16)
        ]
    return Diagnosis(
        versions={name: _version(name) for name in ("replknet", "torch", "timm", "triton")},
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        threads=torch.get_num_threads(),
        native=native_core.status(),
        cuda=[_gpu(i) for i in range(torch.cuda.device_count())],
        forced=forced(),
        checks=[_check(call) for call in calls],
    )


@dataclass(frozen=True)
class Opinion:
    """What one backend says about one call."""

    name: str
    automatic: bool  # whether it is asked when no backend is forced
    refusal: str | None
    declines: str | None  # why the automatic choice skips it
    explanation: list[str]


@dataclass(frozen=True)
class Explanation:
    """Why one backend takes one call: `str()` is for people, `asdict()` for programs."""

    call: str
    backend: str | None
    forced: str | None
    error: str | None  # text of the error that the operator would raise
    opinions: list[Opinion]

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        how = f"forced by {VARIABLE} or use_backend" if self.forced else "the first that neither refuses nor declines"
        lines = [self.call, f"{self.backend} takes it, {how}" if self.backend else f"error: {self.error}", ""]
        for opinion in self.opinions:
            lines.append(f"  {opinion.name:<10} {self._word(opinion)}")
            lines += [f"  {'':<10}   {line}" for line in opinion.explanation]
        return "\n".join(lines)

    def _word(self, opinion: Opinion) -> str:
        if opinion.refusal is not None:
            return f"refuses: {opinion.refusal}"
        if opinion.name == self.backend:
            return "takes it"
        if opinion.declines is not None:
            return f"would take it when asked by name; declines: {opinion.declines}"
        return "would take it" if opinion.automatic else "would take it when asked by name"


def explain(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str = "cpu",
) -> Explanation:
    """Which backend takes one call, and what each backend says about it.

    Args:
        shape: of x, `[N,C,H,W]`.
        kernel: height and width, pixels, both odd.
        dtype: float64, float32, float16 or bfloat16.
        channels_last: layout of x.
        device: "cpu", "cuda" or "cuda:1" and so on.

    Returns:
        The choice, and the opinion of each backend: why it refuses or declines the call, or how it would carry it out.

    Raises:
        ValueError: the operator does not accept such arguments, `device` is none of these names, or REPLKNET_BACKEND
            names no backend.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty(shape[1], 1, *kernel, dtype=dtype, device="meta")
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
    if found is None:
        raise ValueError(f"device must be cpu, cuda or cuda:1 and so on, got {device!r}")
    call = replace(call_of(x, weight), device=found[1], index=int(found[2] or 0))
    error = None
    try:
        backend = choose(call).name
    except RuntimeError as reason:
        backend, error = None, str(reason)
    opinions = []
    for b in BACKENDS:
        refusal = b.refusal(call)
        lines = b.explanation(call) if refusal is None and b.explanation is not None else []
        declines = b.declines(call) if refusal is None and b.declines is not None else None
        opinions.append(Opinion(b.name, b.automatic, refusal, declines, lines))
    return Explanation(str(call), backend, forced(), error, opinions)


def _gpu(index: int) -> Gpu:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    call = Call(shape=(1, 1, 8, 8), kernel=(7, 7), dtype=torch.bfloat16, device="cuda", index=index)
    refusal = measured.BACKEND.refusal(call)
    version = ".".join(map(str, capability))
    if refusal is not None:
        return Gpu(name, version, refusal, [], {}, "", 0)
    device = device_at(index)
    table = device.table
    wrong = {check: found for check, found in table.checks.items() if found != "right"}
    return Gpu(
        name=name,
        capability=version,
        refusal=None,
        right=[check for check, found in table.checks.items() if found == "right" and check not in device.broken],
        broken=wrong | device.broken,
        table=str(table.path),
        timed=len(table.entries),
    )


def _check(call: Call) -> Check:
    try:
        backend = choose(call).name
    except RuntimeError:
        backend = None
    return Check(call=str(call), backend=backend, refusals=refusals(call))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
