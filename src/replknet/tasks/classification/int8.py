"""Classifiers in int8 for `replknet export --int8`: the file, and scores and times before and after."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Subset

from replknet.data.batches import batches
from replknet.deploy.files import ENDINGS as FLOAT_ENDINGS
from replknet.deploy.files import Exported, card_in
from replknet.deploy.quantizers import Target
from replknet.tasks.classification.export import card_of, export_classifier
from replknet.tasks.classification.infer import evaluate
from replknet.tasks.classification.quantize import ENDINGS, quantize_classifier, size, timed
from replknet.tasks.classification.sets import evaluation_set
from replknet.tasks.classification.settings import Int8Settings
from replknet.tasks.task import Int8, Network, Quantization

_BATCH = 64
# sizes of the batches that are timed
_TIMED = (1, 32)


def _write(
    network: Network,
    path: Path,
    to: str,
    settings: Int8Settings,
    licence: str,
    shown: Callable[[Iterable[Any], str], Iterable[Any]],
) -> Quantization:
    target = next(target for target in ENDINGS if target == to)
    result = _quantized(network, path, target, settings, licence, shown)
    lost = 100 * (result["top1_before"] - result["top1_after"])
    problem = None
    if lost > settings.loss:
        problem = (
            f"the test images lose {lost:.2f} points, more than the {settings.loss} that the search allowed on "
            "training images: a smaller --loss keeps more layers in float32"
        )
    return Quantization(result, tuple(_text(result).splitlines()), problem)


def _quantized(
    network: Network,
    output: Path,
    to: Target,
    settings: Int8Settings,
    licence: str,
    shown: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, Any]:
    model, description = network.model, network.description
    card = card_of(description, licence)
    training = evaluation_set(settings.dataset, settings.data, description, settings.unreadable_images, training=True)
    if len(training) <= settings.calibration:
        raise ValueError(
            f"expected more training images than the {settings.calibration} for calibration, got {len(training)}; "
            "--calibration N takes fewer"
        )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = [batch[0] for batch in batches(Subset(training, order[: settings.calibration]), _BATCH) if batch]
    search = Subset(training, order[settings.calibration : settings.calibration + settings.search])
    found = quantize_classifier(
        model,  # type: ignore[arg-type]  # a StagedNet
        card,
        output,
        to,
        calibration,
        batches(search, _BATCH),
        settings.loss,
        not settings.per_tensor,
    )
    test = evaluation_set(settings.dataset, settings.data, description, settings.unreadable_images)
    with TemporaryDirectory() as folder:
        before = Path(folder) / f"float{FLOAT_ENDINGS[to]}"
        export_classifier(model, card, before, to)  # type: ignore[arg-type]  # a StagedNet
        scores = {
            name: evaluate(Exported(card_in(file)[1]), shown(batches(test, _BATCH), name))
            for name, file in (("before", before), ("after", output))
        }
        threads = torch.get_num_threads()
        sides = (card.image_size, card.image_size)
        times = [(n, timed({"before": before, "after": output}, torch.randn(n, 3, *sides), threads)) for n in _TIMED]
    return {
        "output": str(output),
        "to": to,
        "per_channel": not settings.per_tensor,
        "images": scores["after"].images,
        "top1_before": scores["before"].top1,
        "top1_after": scores["after"].top1,
        "loss_allowed": settings.loss,
        "bytes_before": found.bytes_before,
        "bytes_after": size(output),
        "threads": threads,
        "times": [
            {"images": n, **{name: dataclasses.asdict(time) for name, time in both.items()}} for n, both in times
        ],
        "calibration": sum(map(len, calibration)),
        "search": dataclasses.asdict(found),
        "card": dataclasses.asdict(card),
    }


def _text(result: dict[str, Any]) -> str:
    search = result["search"]
    before, after = (100 * result[f"top1_{when}"] for when in ("before", "after"))
    small, large = (result[f"bytes_{when}"] / 1e6 for when in ("after", "before"))
    lines = [
        f"{result['output']}: top-1 of {result['images']} test images {before:.2f} % before, {after:.2f} % after",
        f"size {large:.2f} MB before, {small:.2f} MB after",
    ]
    for times in result["times"]:
        n, float_ms, int8_ms = times["images"], times["before"]["p50_ms"], times["after"]["p50_ms"]
        lines.append(
            f"{n} image{'s' if n > 1 else ''} in {float_ms:.2f} ms before, {int8_ms:.2f} ms after "
            f"({float_ms / int8_ms:.2f} times as fast; threads: {result['threads']})"
        )
    lines.append(
        f"search: {search['images']} training images, top-1 {100 * search['before']:.2f} % before, "
        f"{100 * search['all_int8']:.2f} % with all {len(search['layers'])} layers in int8, "
        f"{100 * search['after']:.2f} % in the file, which loses {100 * search['lost']:.2f} points of right answers"
    )
    kept = [layer for layer in search["layers"] if layer["kept"]]
    lines.append(f"layers kept in float32: {len(kept) or 'none'}")
    for layer in sorted(kept, key=lambda layer: -layer["sensitivity"]):
        ranges = layer["ranges"]
        centre = "" if ranges["centre"] is None else f", centre {ranges['centre']:.1f} times the taps around it"
        lines.append(
            f"  {layer['name']} {layer['shape']}: alone it changes the logits by {100 * layer['sensitivity']:.1f} %; "
            f"largest weight {ranges['peak']:.1f} times the channel's rms, {ranges['spread']:.1f} times the median "
            f"channel's largest{centre}"
        )
    return "\n".join(lines)


INT8 = Int8({str(to): ending for to, ending in ENDINGS.items()}, _write)
