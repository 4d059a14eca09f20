"""Workloads of the depthwise benchmark: named cases in suites, from real networks and the paper."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

What = Literal["forward", "gradients", "step"]  # "step" is the forward pass and both gradients through autograd
Rival = Literal["torch nhwc", "torch nchw", "torch"]  # torch's own convolution by layout; "torch": the faster


@dataclass(frozen=True, slots=True)
class Target:
    """A goal: the operator is this many times faster than a rival."""

    what: What
    rival: Rival
    ratio: float


@dataclass(frozen=True, slots=True)
class Case:
    """One depthwise layer: images `[N,C,H,W]` and the side of its kernel."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: int
    targets: tuple[Target, ...] = field(default=(), kw_only=True)

    @property
    def flops(self) -> int:
        """Multiplications plus additions, padding included, as torch's FLOP counter counts."""
        n, c, h, w = self.shape
        return 2 * n * c * h * w * self.kernel**2

    @property
    def useful_flops(self) -> int:
        """`flops` without the products with padding, which a direct algorithm can skip."""
        n, c, h, w = self.shape
        return 2 * n * c * _taps(h, self.kernel) * _taps(w, self.kernel)

    @property
    def layers(self) -> "tuple[Case, ...]":
        return (self,)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that run one after the other, each with its own weights, as in a network."""

    name: str
    layers: tuple[Case, ...]
    targets: tuple[Target, ...] = ()

    @property
    def flops(self) -> int:
        return sum(case.flops for case in self.layers)

    @property
    def useful_flops(self) -> int:
        return sum(case.useful_flops for case in self.layers)


@dataclass(frozen=True, slots=True)
class Suite:
    """Workloads that answer one question together."""

    question: str
    cases: tuple[Case | Stack, ...]
    whats: tuple[What, ...] = ("forward",)
    runtimes: bool = False  # whether ONNX Runtime and OpenVINO are measured, too


def _taps(side: int, kernel: int) -> int:
    """The number of pairs (output, tap) along one axis whose tap lies inside the image."""
    return sum(max(0, side - abs(d)) for d in range(-(kernel // 2), kernel // 2 + 1))


def _faster(forward: float | None, gradients: float | None = None) -> tuple[Target, ...]:
    """Targets of a layer: forward against channels_last, gradients against the faster layout."""
    found: list[Target] = []
    if forward is not None:
        found.append(Target("forward", "torch nhwc", forward))
    if gradients is not None:
        found.append(Target("gradients", "torch", gradients))
    return tuple(found)


# RepLKNet-31B: the large kernels of its four stages at 224 pixels, and at 512 as in segmentation
_STAGES = (
    Case("31b.stage1", (1, 128, 56, 56), 31, targets=_faster(32, 120)),
    Case("31b.stage2", (1, 256, 28, 28), 29, targets=_faster(22, 110)),
    Case("31b.stage3", (1, 512, 14, 14), 27, targets=_faster(11, 45)),
    Case("31b.stage4", (1, 1024, 7, 7), 13, targets=_faster(6, 22)),
)
_STAGES_512 = (
    Case("31b.stage1.512px", (1, 128, 128, 128), 31, targets=_faster(25)),
    Case("31b.stage2.512px", (1, 256, 64, 64), 29, targets=_faster(28)),
    Case("31b.stage3.512px", (1, 512, 32, 32), 27, targets=_faster(22)),
    Case("31b.stage4.512px", (1, 1024, 16, 16), 13, targets=_faster(8)),
)
_STAGES_N8 = (
    Case("31b.stage1.n8", (8, 128, 56, 56), 31, targets=_faster(28)),
    Case("31b.stage2.n8", (8, 256, 28, 28), 29, targets=_faster(18)),
    Case("31b.stage3.n8", (8, 512, 14, 14), 27, targets=_faster(9, 60)),
    Case("31b.stage4.n8", (8, 1024, 7, 7), 13, targets=_faster(5)),
)
_DEPTHS = (2, 2, 18, 2)
_NETWORK = Stack(
    "31b.layers",
    tuple(stage for stage, depth in zip(_STAGES, _DEPTHS, strict=True) for _ in range(depth)),
    (Target("forward", "torch nhwc", 18), Target("forward", "torch nchw", 200)),
)

_SMALL = (
    Case("convnext_tiny.stage1", (1, 96, 56, 56), 7, targets=_faster(1.5)),
    Case("convnext_tiny.stage2", (1, 192, 28, 28), 7, targets=_faster(1.5)),
    Case("convnext_tiny.stage3", (1, 384, 14, 14), 7, targets=_faster(1.5)),
    Case("convnext_tiny.stage4", (1, 768, 7, 7), 7, targets=_faster(1.5)),
    Case("small.k5.n32", (32, 64, 16, 16), 5, targets=_faster(1.5)),
    Case("small.k3.n32", (32, 64, 16, 16), 3),
    Case("cifar.stage1.n128", (128, 32, 16, 16), 15),
)

_TABLE_1 = tuple(
    Case(f"table1.n{n}.r{r}.k{k}", (n, 384, r, r), k, targets=_faster(1.5) if k in (5, 7) else ())
    for n in (1, 64)
    for r in (16, 32, 64)
    for k in (3, 5, 7, 9, 13, 17, 21, 27, 29, 31)
)


def grid(count: int = 100, largest: float = 1e9) -> tuple[Case, ...]:
    """Shapes with K >= 7 and C >= 32, spread evenly over N, C, H, W and K; every call gives the same shapes.

    Point i of the sequence is the fractional part of i * (1/g, 1/g**2, ..., 1/g**5) with g**6 = g + 1. This is the
    additive recurrence with the generalised golden ratio. Each coordinate picks from a list of sizes. Repetitions are
    left out. So are points of more than `largest` products, padding included: torch's contiguous convolution would
    take seconds for them.
    """
    sizes = (
        (1, 2, 4, 8, 16, 32),  # N
        (32, 36, 48, 64, 96, 100, 128, 192, 256, 384, 512, 768, 1024),  # C
        (5, 7, 10, 14, 16, 20, 28, 32, 48, 56, 64, 80, 112, 128),  # H
        (5, 7, 10, 14, 16, 20, 28, 32, 48, 56, 64, 80, 112, 128),  # W
        (7, 9, 11, 13, 15, 17, 21, 25, 27, 29, 31, 51),  # K
    )
    g = 1.0
    for _ in range(60):
        g = (g + 1) ** (1 / 6)
    cases: dict[str, Case] = {}
    i = 0
    while len(cases) < count:
        i += 1
        point = (math.fmod(i / g ** (axis + 1), 1.0) for axis in range(5))
        n, c, h, w, k = (options[int(u * len(options))] for options, u in zip(sizes, point, strict=True))
        case = Case(f"grid.n{n}.c{c}.{h}x{w}.k{k}", (n, c, h, w), k)
        if case.flops <= 2 * largest:
            cases[case.name] = case
    return tuple(cases.values())


SUITES: dict[str, Suite] = {
    "layers": Suite(
        "how fast are the layers of RepLKNet-31B", (*_STAGES, *_STAGES_512, *_STAGES_N8, _NETWORK), runtimes=True
    ),
    "table1": Suite("what does a larger kernel cost (Table 1 of the paper)", _TABLE_1, runtimes=True),
    "small": Suite("how fast are small kernels", _SMALL, runtimes=True),
    "grid": Suite("is the operator anywhere slower than torch", grid()),
    "training": Suite("how fast is a training step of a layer", (*_STAGES, *_STAGES_N8), ("gradients", "step")),
}


def chosen(suite: str | None, patterns: list[str]) -> Iterator[tuple[str, Suite, list[Case | Stack]]]:
    """The suites and their workloads whose name fits one of the patterns; each workload once.

    Without a suite, patterns are looked up in all suites. Without suite and patterns, the suite is "layers".

    Raises:
        ValueError: a pattern fits no workload.
    """
    names = [suite] if suite is not None else list(SUITES) if patterns else ["layers"]
    everything = [case.name for name in names for case in SUITES[name].cases]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everything):
            where = "" if suite is None else f" in the suite {suite}"
            raise ValueError(f"no case is called {pattern}{where}; --list shows every case")
    seen: set[str] = set()
    for name in names:
        wanted = [
            case
            for case in SUITES[name].cases
            if case.name not in seen and any(fnmatchcase(case.name, pattern) for pattern in patterns or ["*"])
        ]
        seen.update(case.name for case in wanted)
        if wanted:
            yield name, SUITES[name], wanted
