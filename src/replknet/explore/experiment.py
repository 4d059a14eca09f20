"""Experiments: a question of the paper, arms that are measured, and claims that the figures support or not."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from replknet.reading import Kind
from replknet.shown import shown
from replknet.train.files import is_number, told, write_text
from replknet.train.hardware import Hardware

Scale = Literal["small", "full"]
# figure -> value of a run: numbers, and anything else that JSON takes
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Site:
    """The data, the hardware and the output folder of experiments.

    Args:
        output: folder of all results.
        images: folder that keeps CIFAR-10, or folder of ImageNet; None: the cache.
        masks: folder or zip of images with masks, for segmentation.
        conflicts: folder of cue-conflict images.
        hardware: hardware settings of trainings.
    """

    output: Path
    images: Path | None = None
    masks: Path | None = None
    conflicts: Path | None = None
    hardware: Hardware = field(default_factory=Hardware)

    def folder(self, arm: "Arm", seed: int) -> Path:
        """The folder of a run; arms with equal configurations share it."""
        return self.output / "runs" / f"{arm.key}-s{seed}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One case of an experiment, which is measured once for each seed.

    Args:
        name: name in tables.
        configuration: everything that decides its figures, except for the seed; ready for JSON.
        run: maps seed, folder of the run and site to the figures. Called again after an interruption, it goes on.
        seconds: maps the site to the estimated seconds of one run on this machine.
        seeds: number of runs.
        needs: arms that must be run first, with the seed of this run.
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
    """One run of an arm, as its file keeps it.

    Args:
        arm: name of the arm.
        key: key of the arm's configuration.
        seed: seed of all random numbers.
        figures: what was measured.
        seconds: wall time; after an interruption only the time since then.
        provenance: device, threads, versions, settings, commit and date.
    """

    arm: str
    key: str
    seed: int
    figures: Figures
    seconds: float
    provenance: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the run as JSON: completely or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


class RecordError(ValueError):
    """A file of experiments that is damaged. The text says which, why, and what to do."""


RECORD = Kind(RecordError, "a record of experiments", "move it away, and run the experiment again")
_TYPES = {"arm": str, "key": str, "seed": int, "figures": dict, "seconds": float, "provenance": dict}


def run_from(content: object, where: Path) -> Run:
    """The run in a record.

    Args:
        content: the run as JSON keeps it.
        where: the file, for the error.

    Raises:
        RecordError: a field is missing, unknown or of another type.
    """
    wrong = None
    if not isinstance(content, dict):
        wrong = f"expected an object for a run, got {told(content)}"
    elif content.keys() != _TYPES.keys():
        (name, *_) = sorted(content.keys() ^ _TYPES.keys())
        wrong = f"a run must have {', '.join(_TYPES)}; {told(name)} is missing or unknown"
    else:
        for name, kind in _TYPES.items():
            value = content[name]
            if not (is_number(value) if kind is float else type(value) is kind):
                wrong = f"{name} must be of type {kind.__name__}, got {told(value)}"
                break
    if wrong is not None:
        raise RecordError(f"{shown(where)} is not {RECORD.expected}: {wrong}; {RECORD.way_out}")
    assert isinstance(content, dict)
    return Run(**content)


@dataclass(frozen=True)
class Results:
    """The runs of an experiment that are done."""

    runs: tuple[Run, ...]

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm, in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def values(self, arm: str, figure: str) -> list[float]:
        """A figure of all runs of an arm, without the runs that lack it."""
        found = (run.figures.get(figure) for run in self.of(arm))
        return [float(value) for value in found if value is not None]


Verdict = Literal["agrees", "does not agree", "within the spread"]


@dataclass(frozen=True)
class Finding:
    """Our result for a claim, in words, and whether its direction agrees with the paper's; None: no direction."""

    text: str
    verdict: Verdict | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and how our runs test it.

    Args:
        text: the claim.
        paper: the paper's figure and its table; only what we have seen there.
        ours: maps the results to a finding; None while runs are missing.
    """

    text: str
    paper: str
    ours: Callable[[Results], Finding | None]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column in the table of an experiment.

    Args:
        figure: name of the figure in the runs.
        title: title of the column, with the unit.
        scale: factor from the figure to the unit of the table.
        digits: digits after the point.
        paper: arm -> the paper's figure, in the unit of the table.
    """

    figure: str
    title: str
    scale: float = 1.0
    digits: int = 2
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question of the paper that can be run.

    Args:
        name: name on the command line and of its files.
        title: title of its section in the report.
        question: the question, in a sentence or two.
        scale: what is run, and why that answers the question.
        arms: what is measured.
        columns: columns of the table.
        claims: what the paper says.
        draw: draws the results; None: no picture.
        table: returns the rows of the table, the head first; None: the table has `columns`.
        wants: fields of the site that the experiment needs.
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

    The finding is the difference of our means, with the half-width of its 95 % interval (Student's t, pooled variance
    of both arms). If the interval includes zero, the difference is within the spread of the seeds.

    Args:
        text: the claim.
        figure: name of the figure.
        more: arm with the larger figure, by the paper.
        less: the other arm.
        paper: the paper's difference; None if only its direction is known.
        where: table of the paper.
        scale: factor from figures to the unit.
        unit: unit of the difference.
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
    """Half of the 95 % interval of the difference of two means, with pooled variance; at least two values each."""
    freedom = len(a) + len(b) - 2
    variance = sum((len(v) - 1) * stdev(v) ** 2 for v in (a, b)) / freedom
    error: float = (variance * (1 / len(a) + 1 / len(b))) ** 0.5
    return (_T95[freedom - 1] if freedom <= len(_T95) else 2.2) * error


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Mean and standard deviation of the runs as text; for one run only its value."""
    mean = f"{scale * fmean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * stdev(values):.{digits}f}"
