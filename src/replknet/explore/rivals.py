"""RepLKNet-31B beside the networks that the paper compares it with."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replknet.analysis import plots
from replknet.bench.rivals import MODES, PUBLISHED, RIVALS, Bar, Mode, Published, measure
from replknet.explore.experiment import Arm, Claim, Experiment, Figures, Finding, Results, Scale, Site

_RUNS = 9
_LIMIT_S = 45.0
_OURS = "RepLKNet-31B"


def rivals(scale: Scale) -> Experiment:
    """The costs in Tables 6 to 9 of the paper; every scale has the same arms."""
    arms = tuple(_arm(mode) for mode in MODES.values())
    return Experiment(
        name="rivals",
        title="Side by side: Swin-B, ConvNeXt-B, ResNet-101 and ResNeXt-101",
        question="What does RepLKNet-31B cost beside the networks that the paper compares it with?",
        scale="Full size with random weights, one image, float32, in turns in one process; the faster of both "
        "memory formats; merged, the others as timm has them. Memory is of a process of its own: with the weights, "
        "and what one run adds. The accuracies are the papers', not ours.",
        arms=arms,
        claims=tuple(_faster(mode) for mode in MODES.values()),
        draw=lambda results: _draw(arms, results),
        table=lambda results: _table(arms, results),
    )


def _arm(mode: Mode) -> Arm:
    return Arm(
        name=mode.name,
        configuration={"rivals": list(RIVALS), "mode": asdict(mode), "runs": _RUNS},
        run=partial(_measure, mode),
        seconds=lambda site: 120.0 + (mode.size / 224) ** 2 * 60,
    )


def _measure(mode: Mode, seed: int, folder: Path, site: Site) -> Figures:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(mode, runs=_RUNS, limit_s=_LIMIT_S, device=device)
    return {"networks": {one.name: asdict(one) for one in found}}


def _networks(results: Results, arm: str) -> dict[str, Any]:
    runs = results.of(arm)
    return runs[0].figures["networks"] if runs else {}


def _ms(network: dict[str, Any]) -> float:
    ms: float = network["timings"][network["layout"]]["p50_ms"]
    return ms


def _faster(mode: Mode) -> Claim:
    def ours(results: Results) -> Finding | None:
        networks = _networks(results, mode.name)
        if not networks:
            return None
        found = _ms(networks["Swin-B"]) / _ms(networks[_OURS])
        return Finding(f"{found:.2f} times as fast", "agrees" if found > 1 else "does not agree")

    known = "1.43 times as fast at 384, on a GPU"
    return Claim(
        text=f"{_OURS} is faster than Swin-B: {mode.name}",
        paper=known if mode.size == 384 else f"faster; {known}",
        ours=ours,
    )


def _table(arms: tuple[Arm, ...], results: Results) -> list[list[str]]:
    head = ["", "", "parameters, M", "multiply-adds, G", "ms", "format", "memory, MB", "the papers' accuracy"]
    rows = [head]
    for arm in arms:
        for name, one in _networks(results, arm.name).items():
            memory = one["memory"]
            beyond = "-"
            if memory is not None:
                weights = memory["loaded_bytes"] - memory["program_bytes"]
                beyond = f"{weights / 1e6:.0f} + {(memory['peak_bytes'] - memory['loaded_bytes']) / 1e6:.0f}"
            rows.append(
                [
                    arm.name,
                    name,
                    f"{one['parameters'] / 1e6:.1f}",
                    f"{one['multiply_adds'] / 1e9:.1f}",
                    f"{_ms(one):.0f}",
                    one["layout"],
                    beyond,
                    _published(PUBLISHED.get(name, Published()), one["size"]),
                ]
            )
    return rows


def _published(known: Published, size: int) -> str:
    """The papers' accuracy on the task of images of this size."""
    top1 = {224: known.top1_224, 384: known.top1_384}.get(size)
    if top1 is not None:
        return f"{top1} % of ImageNet"
    if size not in (224, 384) and known.ade20k is not None:
        ap = "" if known.coco is None else f"; box AP {known.coco[0]} on COCO"
        return f"mIoU {known.ade20k[0]} on ADE20K{ap}"
    return "-"


def _draw(arms: tuple[Arm, ...], results: Results) -> Any:
    panels: dict[str, dict[str, Bar]] = {}
    for arm in arms:
        for name, one in _networks(results, arm.name).items():
            t, m = one["timings"][one["layout"]], one["memory"]
            loaded = None if m is None else (m["loaded_bytes"] - m["program_bytes"]) / 1e6
            most = None if m is None else (m["peak_bytes"] - m["program_bytes"]) / 1e6
            panels.setdefault(arm.name, {})[name] = (t["p20_ms"], t["p50_ms"], t["p80_ms"], loaded, most)
    return plots.rivals(panels)
