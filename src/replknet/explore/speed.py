"""Guideline 1: large depthwise kernels can be fast (section 3 and Table 1 of the paper)."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replknet.analysis import plots
from replknet.bench.stacks import CHANNELS, KERNELS, LAYERS, PAPER_TABLE_1, RESOLUTIONS, StackTime, measure
from replknet.explore.experiment import Arm, Claim, Experiment, Figures, Finding, Results, Scale, Site
from replknet.timing import Load

_RUNS = 10
# a way that has taken this many seconds sits out
_LIMIT_S = 15.0


def speed(scale: Scale) -> Experiment:
    """Table 1 of the paper."""
    arms = tuple(_arm(scale, resolution) for resolution in RESOLUTIONS)
    return Experiment(
        name="speed",
        title="Guideline 1: large depthwise kernels can be fast",
        question=f"What does a stack of {LAYERS} depthwise layers of {CHANNELS} channels cost as its kernels grow, "
        "with the operator and with torch's own convolution?",
        scale=f"Forward, float32, {_batch(scale)} image{'s' if scale == 'full' else ''} (the paper: 64 on a 2080Ti); "
        "all kernels and ways of a resolution in turns in one process, both memory formats, the better one of each "
        "in the table.",
        arms=arms,
        claims=tuple(claim for resolution in RESOLUTIONS for claim in _claims(resolution)),
        draw=lambda results: _draw(arms, results),
        table=lambda results: _table(arms, results),
    )


def _batch(scale: Scale) -> int:
    return 64 if scale == "full" else 1


def _name(resolution: int) -> str:
    return f"{resolution}x{resolution}"


def _arm(scale: Scale, resolution: int) -> Arm:
    batch = _batch(scale)
    return Arm(
        name=_name(resolution),
        configuration={"stack": LAYERS, "channels": CHANNELS, "resolution": resolution, "batch": batch, "runs": _RUNS},
        run=partial(_measure, resolution, batch),
        # torch's contiguous convolution takes most of it
        seconds=lambda site: 60.0 + resolution**2 * batch / 20,
    )


def _measure(resolution: int, batch: int, seed: int, folder: Path, site: Site) -> Figures:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = Load()
    found = measure(resolution, batch=batch, runs=_RUNS, limit_s=_LIMIT_S, device=device)
    times = [asdict(one) for one in found if isinstance(one, StackTime)]
    wrong = [asdict(one) for one in found if not isinstance(one, StackTime)]
    return {"times": times, "wrong": wrong, "load": load.end()}


def _best(figures: Figures, who: str) -> dict[int, float]:
    """Kernel side -> median time in the better memory format, ms."""
    found: dict[int, float] = {}
    for one in figures["times"]:
        if one["way"].startswith(who):
            ms = one["timing"]["p50_ms"]
            found[one["kernel"]] = min(ms, found.get(one["kernel"], ms))
    return found


def _figures(results: Results, resolution: int) -> Figures | None:
    runs = results.of(_name(resolution))
    return runs[0].figures if runs else None


def _claims(resolution: int) -> tuple[Claim, ...]:
    paper = {who: PAPER_TABLE_1[resolution, who] for who in ("PyTorch", "ours")}

    def faster(results: Results) -> Finding | None:
        if (figures := _figures(results, resolution)) is None:
            return None
        found = _best(figures, "torch")[31] / _best(figures, "operator")[31]
        return Finding(f"{found:.1f} times", "agrees" if found > 1 else "does not agree")

    def cheap(results: Results) -> Finding | None:
        if (figures := _figures(results, resolution)) is None:
            return None
        ours = _best(figures, "operator")
        found, by_torch = ours[31] / ours[3], _best(figures, "torch")[31] / _best(figures, "torch")[3]
        text = f"{found:.1f} times ({by_torch:.0f} with torch's)"
        return Finding(text, "agrees" if found <= 31**2 / 3**2 else "does not agree")

    return (
        Claim(
            text=f"31x31 on {_name(resolution)} is faster than torch's own",
            paper=f"{paper['PyTorch'][31] / paper['ours'][31]:.1f} times (Table 1)",
            ours=faster,
        ),
        Claim(
            text=f"31x31 on {_name(resolution)} costs less beside 3x3 than its 107 times as many multiply-adds",
            paper=f"{paper['ours'][31] / paper['ours'][3]:.1f} times, "
            f"{paper['PyTorch'][31] / paper['PyTorch'][3]:.0f} with PyTorch's (Table 1)",
            ours=cheap,
        ),
    )


def _table(arms: tuple[Arm, ...], results: Results) -> list[list[str]]:
    head = ["kernel", "multiply-adds on 64x64, G"]
    for resolution in RESOLUTIONS:
        head += [f"{_name(resolution)}: operator, ms", "torch, ms", "times faster", "the paper's"]
    rows = [head]
    for kernel in KERNELS:
        row = [f"{kernel}x{kernel}", f"{LAYERS * CHANNELS * 64**2 * kernel**2 / 1e9:.2f}"]
        for resolution in RESOLUTIONS:
            figures = _figures(results, resolution)
            paper = PAPER_TABLE_1[resolution, "PyTorch"][kernel] / PAPER_TABLE_1[resolution, "ours"][kernel]
            if figures is None:
                row += ["-", "-", "-", f"{paper:.1f}"]
                continue
            ours, torchs = _best(figures, "operator")[kernel], _best(figures, "torch")[kernel]
            row += [f"{ours:.1f}", f"{torchs:.1f}", f"{torchs / ours:.1f}", f"{paper:.1f}"]
        rows.append(row)
    return rows


def _draw(arms: tuple[Arm, ...], results: Results) -> Any:
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    paper = {}
    for resolution in RESOLUTIONS:
        if (figures := _figures(results, resolution)) is None:
            continue
        lines: dict[str, list[tuple[int, float, float, float]]] = {}
        for one in figures["times"]:
            t = one["timing"]
            lines.setdefault(one["way"], []).append((one["kernel"], t["p20_ms"], t["p50_ms"], t["p80_ms"]))
        panels[_name(resolution)] = lines
        paper[_name(resolution)] = {who: PAPER_TABLE_1[resolution, who] for who in ("PyTorch", "ours")}
    counted = {kernel: LAYERS * CHANNELS * 64**2 * kernel**2 for kernel in KERNELS}
    return plots.stack_times(panels, counted, paper)
