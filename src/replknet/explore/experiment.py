"""What an experiment is: a question of the paper, arms that are measured, and claims that they bear out or not."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from replknet.train.hardware import Hardware

Scale = Literal["small", "full"]
# what a run measures: numbers, and whatever else JSON takes
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where experiments run.

    Args:
        output: folder of all results.
        images: where CIFAR-10 is kept, or the folder of ImageNet; None for the cache.
        masks: folder or zip of images with masks, for segmentation.
        conflicts: folder of cue-conflict images.
        hardware: devices and the like, for trainings.
    """

    output: Path
    images: Path | None = None
    masks: Path | None = None
    conflicts: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)

    def folder(self, arm: "Arm", seed: int) -> Path:
        """Where a run of an arm keeps its files; arms that are alike share it."""
        return self.output / "runs" / f"{arm.key}-s{seed}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing of an experiment that is measured, once for each seed.

    Args:
        name: in tables.
        configuration: everything that decides its figures but the seed, as JSON takes it.
        run: from the seed, a folder of its own and the site to the figures; called again after an interruption, it goes
            on in the folder.
        seconds: of one run on this machine, estimated.
        seeds: runs.
        needs: arms whose run of the same seed must be there first.
    """

    name: str
    configuration: Mapping[str, Any]
    run: Callable[[int, Path, Site], Figures]
    seconds: Callable[[Site], float]
    seeds: int = 1
    needs: tuple["Arm", ...] = ()

    @property
    def key(self) -> str:
        """A short digest of the configuration."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an arm, as it is kept.

    Args:
        arm: its name.
        key: of its configuration.
        seed: of all random numbers.
        figures: what was measured.
        seconds: wall time, as long as the run was not interrupted.
        provenance: device, threads, versions, settings, commit and date.
    """

    arm: str
    key: str
    seed: int
    figures: Figures
    seconds: float
    provenance: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)


@dataclass(frozen=True)
class Results:
    """The runs of an experiment that are there."""

    runs: tuple[Run, ...]

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def values(self, arm: str, figure: str) -> list[float]:
        """A figure of every run of an arm that has it."""
        found = (run.figures.get(figure) for run in self.of(arm))
        return [float(value) for value in found if value is not None]


Verdict = Literal["agrees", "does not agree", "within the spread"]


@dataclass(frozen=True)
class Finding:
    """What our runs say to a claim, in words, and whether its direction is the paper's; None where none is said."""

    text: str
    verdict: Verdict | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says, and how our runs are asked.

    Args:
        text: the claim.
        paper: its figure with the table; only what we have seen there.
        ours: from the results to a finding; None while runs are missing.
    """

    text: str
    paper: str
    ours: Callable[[Results], Finding | None]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure in the table of an experiment.

    Args:
        figure: its name in the runs.
        title: above the column, with the unit.
        scale: by which it is multiplied for the table.
        digits: after the point.
        paper: the paper's figure of an arm, in the unit of the table.
    """

    figure: str
    title: str
    scale: float = 1.0
    digits: int = 2
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question of the paper, as something that runs.

    Args:
        name: on the command line and of its files.
        title: of its section in the report.
        question: what it asks, in a sentence or two.
        scale: what is run, and why it is telling.
        arms: what is measured.
        columns: figures of the table.
        claims: what the paper says.
        draw: a picture of the results, or None.
        table: the rows of another table than that of the columns, the head first, or None.
        wants: data of the site without which nothing runs.
    """

    name: str
    title: str
    question: str
    scale: str
    arms: tuple[Arm, ...]
    columns: tuple[Column, ...] = ()
    claims: tuple[Claim, ...] = ()
    draw: Callable[[Results], Any] | None = None
    table: Callable[[Results], list[list[str]]] | None = None
    wants: tuple[Literal["images", "masks", "conflicts"], ...] = ()


# two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def compared(
    text: str,
    figure: str,
    more: str,
    less: str,
    paper: float | None,
    where: str,
    scale: float = 100.0,
    unit: str = "points",
) -> Claim:
    """A claim that one arm's figure is larger than another's.

    Our difference of means stands with the half-width of its 95 % interval (Student's t, pooled variance of both arms);
    where that includes zero the difference is within the spread of the seeds.

    Args:
        text: the claim.
        figure: that is compared.
        more: arm with the larger figure, by the paper.
        less: the other arm.
        paper: the paper's difference, or None where only its direction is known.
        where: table of the paper.
        scale: by which differences are multiplied.
        unit: of the difference after that.
    """

    def ours(results: Results) -> Finding | None:
        a, b = results.values(more, figure), results.values(less, figure)
        if not a or not b:
            return None
        found = scale * (fmean(a) - fmean(b))
        direction: Verdict = "agrees" if found > 0 else "does not agree"
        if min(len(a), len(b)) < 2:
            return Finding(f"{found:+.2f} {unit}, one seed", direction)
        half = scale * half_width(a, b)
        verdict: Verdict = "within the spread" if abs(found) <= half else direction
        return Finding(f"{found:+.2f} ± {half:.2f} {unit}", verdict)

    stated = "larger" if paper is None else f"{paper:+.2f} {unit}"
    return Claim(text=text, paper=f"{stated} ({where})", ours=ours)


def half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """Half the 95 % interval of a difference of means, with the pooled variance of both; two values each at least."""
    freedom = len(a) + len(b) - 2
    variance = sum((len(v) - 1) * stdev(v) ** 2 for v in (a, b)) / freedom
    error: float = (variance * (1 / len(a) + 1 / len(b))) ** 0.5
    return (_T95[freedom - 1] if freedom <= len(_T95) else 2.2) * error


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Mean and standard deviation of runs as text; of one run, its value."""
    mean = f"{scale * fmean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * stdev(values):.{digits}f}"
