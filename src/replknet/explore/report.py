"""The report of all experiments: what the paper says, what our runs say, and whether they agree."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

from replknet.analysis import plots
from replknet.explore.experiment import RECORD, Experiment, Results, Verdict, spread
from replknet.explore.program import restored
from replknet.reading import reading
from replknet.train.files import write_text

_HEAD = """# The paper as experiments

Made by `replknet explore`. Each section is one experiment: what the paper (Ding et al. 2022, arXiv:2203.06717, and its
journal version, arXiv:2410.08049) says, and what it gave here at the scale that the section states. Figures of ours are
means and standard deviations over seeds; differences stand with the half-width of their 95 % interval. The paper's
figures are of ImageNet, ADE20K or its own machines: compare directions, not values.
"""


def write(experiments: Sequence[Experiment], folder: Path) -> Path:
    """Write `report.md` and its pictures from the records in a folder.

    Args:
        experiments: the experiments, in the order of the page. Experiments without a record are left out.
        folder: folder of the records, EXPERIMENT.json.

    Returns:
        The path of the page.

    Raises:
        RecordError: a record is damaged.
        ValueError: there is no record, or a record has another configuration.
    """
    sections = []
    verdicts = []
    for experiment in experiments:
        path = folder / f"{experiment.name}.json"
        if not path.exists():
            continue
        results = restored(experiment, path)
        if not results.runs:
            continue
        picture = ""
        if experiment.draw is not None:
            with reading(path, RECORD):
                figure = experiment.draw(results)
            plots.save(figure, folder / f"{experiment.name}.png")
            picture = f"![{experiment.title}]({experiment.name}.png)\n"
        # an experiment takes the figures that its arms wrote
        with reading(path, RECORD):
            claims = _claims(experiment, results)
            sections.append(_section(experiment, results, claims, picture))
        verdicts += [[experiment.name, *row] for row in claims]
    if not sections:
        names = ", ".join(f"{experiment.name}.json" for experiment in experiments)
        raise ValueError(f"there is no record of an experiment in {folder}: expected at least one of {names}")
    overview = _table([["experiment", "claim", "the paper's figure", "ours", "direction"], *verdicts])
    page = folder / "report.md"
    write_text(page, "\n".join([_HEAD, "## All claims\n", _summary(verdicts), overview, *sections]))
    return page


def _summary(verdicts: list[list[str]]) -> str:
    """The number of claims with each verdict."""
    counts = Counter(row[-1].strip("*") for row in verdicts)
    asked = sum(counts[verdict] for verdict in get_args(Verdict))
    told = ", ".join(f'"{verdict}" {counts[verdict]}' for verdict in get_args(Verdict))
    return f"Claims with a direction that were asked here: {asked}; {told}.\n"


def _section(experiment: Experiment, results: Results, claims: list[list[str]], picture: str) -> str:
    table = experiment.table(results) if experiment.table is not None else _figures(experiment, results)
    parts = [f"## {experiment.title}\n", f"{experiment.question}\n", f"Scale: {experiment.scale}\n", _table(table)]
    if claims:
        parts.append(_table([["claim", "the paper's figure", "ours", "direction"], *claims]))
    return "\n".join([*parts, picture, f"{_where(experiment, results)}\n"])


def _figures(experiment: Experiment, results: Results) -> list[list[str]]:
    """One row an arm, with the paper's figures beside ours."""
    head = ["", "seeds"]
    for column in experiment.columns:
        head.append(column.title)
        if column.paper:
            head.append("the paper's")
    rows = [head]
    for arm in experiment.arms:
        row = [arm.name, f"{len(results.of(arm.name))} of {arm.seeds}"]
        for column in experiment.columns:
            values = results.values(arm.name, column.figure)
            row.append(spread(values, column.scale, column.digits) if values else "-")
            if column.paper:
                row.append(f"{column.paper[arm.name]:g}" if arm.name in column.paper else "-")
        rows.append(row)
    return rows


def _claims(experiment: Experiment, results: Results) -> list[list[str]]:
    rows = []
    for claim in experiment.claims:
        finding = claim.ours(results)
        if finding is None:
            rows.append([claim.text, claim.paper, "not run", "-"])
        else:
            rows.append([claim.text, claim.paper, finding.text, f"**{finding.verdict}**" if finding.verdict else "-"])
    return rows


def _where(experiment: Experiment, results: Results) -> str:
    """Number, mean time and devices of the runs."""
    devices = sorted({f"{run.provenance['device']}, {_threads(run.provenance['threads'])}" for run in results.runs})
    seconds = fmean(run.seconds for run in results.runs)
    return (
        f"Runs: {len(results.runs)}, {seconds:.0f} s on average, on {'; '.join(devices)}. "
        f"Record: [{experiment.name}.json]({experiment.name}.json). Again: `replknet explore --only {experiment.name}`."
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]) + "\n"
