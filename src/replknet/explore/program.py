"""The whole programme: every experiment, what of it is still to be run, and its records."""

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
from replknet.explore.experiment import Arm, Experiment, Results, Run, Scale, Site

# the most telling first
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
    """A run that is wanted: of this experiment's arm, with this seed."""

    experiment: Experiment
    arm: Arm
    seed: int


class NotReady(ValueError):
    """A run that another one must come before; the text names it."""


def chosen(scale: Scale, patterns: Sequence[str], seeds: int | None = None) -> list[Todo]:
    """The runs of the experiments and arms that patterns name, first seeds first.

    Args:
        scale: "small" for this machine, "full" for the paper's.
        patterns: of EXPERIMENT or EXPERIMENT/ARM, with * and ?; none for all.
        seeds: runs of each arm at most; None for as many as the experiment has.

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
    """A run that is done."""
    path = site.folder(arm, seed) / "run.json"
    return Run(**json.loads(path.read_text())) if path.exists() else None


# what a site may lack, and what it is called on the command line
_DATA = {
    "images": "the folder of ImageNet: name it with --data",
    "masks": "images with masks: name their folder or zip with --masks",
    "conflicts": "cue-conflict images: name their folder with --cue-conflict",
}


def check_data(todo: Sequence[Todo], site: Site) -> None:
    """Refuse what would fail in the middle of the programme.

    Raises:
        ValueError: an experiment needs data that the site does not have.
    """
    for experiment in {one.experiment.name: one.experiment for one in todo}.values():
        for what in experiment.wants:
            if getattr(site, what) is None:
                raise ValueError(f"{experiment.name} needs {_DATA[what]}, or name the others with --only")


def pending(todo: Sequence[Todo], site: Site) -> list[Todo]:
    """Those that are not done, each once where experiments share it."""
    first: dict[Path, Todo] = {}
    for one in todo:
        if read(site, one.arm, one.seed) is None:
            first.setdefault(site.folder(one.arm, one.seed), one)
    return list(first.values())


def estimates(todo: Sequence[Todo], site: Site) -> list[float]:
    """Seconds of each run: those of another seed where there is one, else what its arm expects of this machine."""
    expected: dict[str, float] = {}
    for one in todo:
        if one.arm.key not in expected:
            done = [run.seconds for seed in range(one.arm.seeds) if (run := read(site, one.arm, seed))]
            expected[one.arm.key] = min(done) if done else one.arm.seconds(site)
    return [expected[one.arm.key] for one in todo]


def run(todo: Sequence[Todo], site: Site, say: Callable[[str], None] = lambda text: None) -> None:
    """Do what is pending, one run after the other, and write each experiment's record after each.

    Another process may work in the same folder: a run that it has begun is left to it.

    Raises:
        NotReady: a run needs one that is neither done nor wanted.
        KeyboardInterrupt: a training was interrupted; it goes on when it is called again.
    """
    left = pending(todo, site)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it
    for number, one in enumerate(left, 1):
        folder = site.folder(one.arm, one.seed)
        if not first:
            # another process of the same training; the first one keeps the books
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
    """Whether this process alone works in the folder; the lock ends with the process, however that ends.

    Windows has no such lock: there two processes must not work in one folder.
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
    """All runs of an experiment that are done, under the names that it gives its arms."""
    found = [
        Run(**{**asdict(done), "arm": arm.name})
        for arm in experiment.arms
        for seed in range(arm.seeds)
        if (done := read(site, arm, seed))
    ]
    return Results(tuple(found))


def record(experiment: Experiment, site: Site) -> Path:
    """Write what is known of an experiment as one JSON file: configurations, seeds, figures, claims."""
    found = results(experiment, site)
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
    path = site.output / f"{experiment.name}.json"
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return path


def restored(experiment: Experiment, path: Path) -> Results:
    """The results in a record, for a report without the folders of the runs.

    Raises:
        ValueError: the record is of another configuration than the experiment has now.
    """
    content = json.loads(path.read_text())
    keys = {arm.name: arm.key for arm in experiment.arms}
    runs = [Run(**run) for run in content["runs"]]
    other = sorted({run.arm for run in runs if keys.get(run.arm) != run.key})
    if other:
        raise ValueError(
            f"{path} has runs of {', '.join(other)} with another configuration than now; move it away and run them "
            "again"
        )
    return Results(tuple(runs))


def to_stderr(text: str) -> None:
    """What `run` says, for people."""
    print(text, file=sys.stderr, flush=True)
