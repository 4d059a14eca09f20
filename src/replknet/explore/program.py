"""The programme: all experiments, their runs that are still to do, and their records."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from replknet.bench.records import provenance
from replknet.explore import conflict, family, fields, guidelines, kernel_sizes, rivals, speed
from replknet.explore.experiment import RECORD, Arm, Experiment, RecordError, Results, Run, Scale, Site, run_from
from replknet.reading import reading
from replknet.shown import shown
from replknet.train.files import read_json, write_text

# name -> experiment for a scale, in the order of runs and report: the most telling first
EXPERIMENTS: dict[str, Callable[[Scale], Experiment]] = {
    "family": family.family,
    "shortcut": guidelines.shortcut,
    "reparam": guidelines.reparam,
    "kernel_sizes": kernel_sizes.classification,
    "segmentation": kernel_sizes.segmentation,
    "dilation": guidelines.dilation,
    "last_stage": guidelines.last_stage,
    "fields": fields.fields,
    "conflict": conflict.conflict,
    "speed": speed.speed,
    "rivals": rivals.rivals,
}


@dataclass(frozen=True)
class Todo:
    """A wanted run: an arm of an experiment, with a seed."""

    experiment: Experiment
    arm: Arm
    seed: int


class NotReady(ValueError):
    """A run needs another run first. The text names both."""


def chosen(scale: Scale, patterns: Sequence[str], seeds: int | None = None) -> list[Todo]:
    """The runs that patterns name: seed 0 of every arm, then seed 1, and so on.

    Args:
        scale: "small" for this machine, "full" for the paper's.
        patterns: patterns of EXPERIMENT or EXPERIMENT/ARM, with * and ?; empty: all.
        seeds: largest number of runs of each arm; None: as many as the arm has.

    Raises:
        ValueError: a pattern names nothing.
    """
    experiments = [build(scale) for build in EXPERIMENTS.values()]
    names = {(e.name, arm.name): (e.name, f"{e.name}/{arm.name}") for e in experiments for arm in e.arms}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for pair in names.values() for name in pair):
            raise ValueError(
                f"no experiment or arm is called {pattern!r}; there are {', '.join(EXPERIMENTS)}, and --list shows "
                "their arms"
            )
    wanted = [
        (e, arm)
        for e in experiments
        for arm in e.arms
        if not patterns or any(fnmatchcase(name, p) for name in names[e.name, arm.name] for p in patterns)
    ]
    most = max((arm.seeds for _, arm in wanted), default=0)
    return [
        Todo(e, arm, seed)
        for seed in range(most if seeds is None else min(most, seeds))
        for e, arm in wanted
        if seed < arm.seeds
    ]


def read(site: Site, arm: Arm, seed: int) -> Run | None:
    """The run of an arm with a seed; None if it is not done.

    Raises:
        RecordError: its file is damaged.
    """
    path = site.folder(arm, seed) / "run.json"
    return run_from(read_json(path, RECORD), path) if path.exists() else None


# field of `Site` -> what the error says if it is missing
_DATA = {
    "images": "the folder of ImageNet: name it with --data",
    "masks": "images with masks: name their folder or zip with --masks",
    "conflicts": "cue-conflict images: name their folder with --cue-conflict",
}


def check_data(todo: Sequence[Todo], site: Site) -> None:
    """Check before the first run that all data is there.

    Raises:
        ValueError: an experiment needs data that the site does not have.
    """
    for experiment in {one.experiment.name: one.experiment for one in todo}.values():
        for what in experiment.wants:
            if getattr(site, what) is None:
                raise ValueError(f"{experiment.name} needs {_DATA[what]}, or name the others with --only")


def pending(todo: Sequence[Todo], site: Site) -> list[Todo]:
    """The runs that are not done. A run that experiments share is listed once."""
    first: dict[Path, Todo] = {}
    for one in todo:
        if read(site, one.arm, one.seed) is None:
            first.setdefault(site.folder(one.arm, one.seed), one)
    return list(first.values())


def estimates(todo: Sequence[Todo], site: Site) -> list[float]:
    """Seconds of each run: the fastest run of its arm with any seed, or else the arm's estimate for this machine."""
    expected: dict[str, float] = {}
    for one in todo:
        if one.arm.key not in expected:
            done = [run.seconds for seed in range(one.arm.seeds) if (run := read(site, one.arm, seed))]
            expected[one.arm.key] = min(done) if done else one.arm.seconds(site)
    return [expected[one.arm.key] for one in todo]


def run(todo: Sequence[Todo], site: Site, say: Callable[[str], None] = lambda text: None) -> None:
    """Do the pending runs one after the other. After each run, write the record of its experiment.

    Another process may work in the folder, too. Runs that it has begun are left to it.

    Raises:
        NotReady: a run needs another run that is not done.
        KeyboardInterrupt: a training was interrupted; the next call goes on with it.
    """
    left = pending(todo, site)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it
    for number, one in enumerate(left, 1):
        folder = site.folder(one.arm, one.seed)
        if not first:
            # a further process of a distributed training; only the first one writes runs and records
            one.arm.run(one.seed, folder, site)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with _taken(folder) as mine:
            if not mine or read(site, one.arm, one.seed) is not None:
                say(f"[{number}/{len(left)}] {_title(one)}: another process has it")
                continue
            _check_needs(one, site)
            say(f"[{number}/{len(left)}] {_title(one)}")
            start = time.perf_counter()
            figures = one.arm.run(one.seed, folder, site)
            Run(
                arm=one.arm.name,
                key=one.arm.key,
                seed=one.seed,
                figures=figures,
                seconds=round(time.perf_counter() - start, 3),
                provenance=provenance(),
            ).write(folder / "run.json")
        record(one.experiment, site)


def _check_needs(one: Todo, site: Site) -> None:
    for need in one.arm.needs:
        if read(site, need, one.seed) is None:
            raise NotReady(
                f"{_title(one)} needs the run of {need.name} with the same seed, which is not there: run the "
                "experiment that has it first, or name both with --only"
            )


def _title(one: Todo) -> str:
    return f"{one.experiment.name}/{one.arm.name}, seed {one.seed}"


@contextmanager
def _taken(folder: Path) -> Iterator[bool]:
    """Lock the folder; yields False if another process holds the lock. The system frees it when the process ends.

    Windows has no such lock: do not let two processes work in one folder there.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def results(experiment: Experiment, site: Site) -> Results:
    """All runs of an experiment that are done, with the experiment's names of its arms."""
    found = [
        Run(**{**asdict(done), "arm": arm.name})
        for arm in experiment.arms
        for seed in range(arm.seeds)
        if (done := read(site, arm, seed))
    ]
    return Results(tuple(found))


def record(experiment: Experiment, site: Site) -> Path:
    """Write the record of an experiment, one JSON file: configurations, seeds, figures, claims."""
    found = results(experiment, site)
    path = site.output / f"{experiment.name}.json"
    with reading(f"{site.output / 'runs'} of {experiment.name}", RECORD):
        findings = [(claim, claim.ours(found)) for claim in experiment.claims]
    content = {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "scale": experiment.scale,
        "arms": {arm.name: {"configuration": arm.configuration, "seeds": arm.seeds} for arm in experiment.arms},
        "claims": [
            {"claim": claim.text, "paper": claim.paper, "ours": None if finding is None else asdict(finding)}
            for claim, finding in findings
        ],
        "runs": [asdict(run) for run in found.runs],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def restored(experiment: Experiment, path: Path) -> Results:
    """The results in a record; a report needs no folders of runs.

    Raises:
        ValueError: the record has another configuration than the experiment has now.
        RecordError: the record is damaged.
    """
    content = read_json(path, RECORD)
    keys = {arm.name: arm.key for arm in experiment.arms}
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise RecordError(f"{shown(path)} is not {RECORD.expected}: it has no list of runs; {RECORD.way_out}")
    runs = [run_from(run, path) for run in content["runs"]]
    other = sorted({run.arm for run in runs if keys.get(run.arm) != run.key})
    if other:
        raise ValueError(
            f"{path} has runs of {', '.join(other)} with another configuration than now; move the file away and run "
            "them again"
        )
    return Results(tuple(runs))


def to_stderr(text: str) -> None:
    """Print a message of `run` for people."""
    print(text, file=sys.stderr, flush=True)
