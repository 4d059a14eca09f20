"""The demo: train a small RepLKNet on real images, merge it, score it before and after, and draw its receptive field.

A second network with 3x3 kernels and an otherwise equal recipe is trained, too, to compare the receptive fields.
"""

import html
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from replknet.analysis import ERF, effective_receptive_field, plots
from replknet.data.batches import batches
from replknet.data.cifar10 import CLASSES, load
from replknet.difference import largest_difference
from replknet.explore.fields import enlarged
from replknet.models import CONFIGS, load_model, save_model
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.tasks.classification.infer import Scores, evaluate
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.classification.sets import evaluation_set
from replknet.tasks.training import fit
from replknet.timing import Timing, interleaved
from replknet.train.files import CURVE, rows_of, write_text
from replknet.train.recipe import Recipe

# images are enlarged for the receptive field, as in the paper, so that it does not end at their border
_FIELD_PIXELS = 96
_FIELD_IMAGES = 64
_SMALL_KERNELS = (3, 3, 3, 3)


@dataclass(frozen=True)
class Outcome:
    """Everything that the report shows about one network."""

    title: str
    recipe: Recipe
    curve: list[dict[str, float]]
    minutes: float
    parameters: tuple[int, int]  # in training, merged
    scores: tuple[Scores, Scores]  # before and after merging
    difference: tuple[float, float]  # of the logits before and after: largest, and relative L2
    times: dict[str, Timing]  # one image, before and after
    field: ERF


def run(output: Path, data: Path | None = None, epochs: int = 5) -> Path:
    """Train, merge, evaluate and draw. After an interruption, another call goes on where the first one stopped.

    Args:
        output: folder for the report and both networks.
        data: folder that keeps CIFAR-10; the cache by default.
        epochs: number of passes over the training images, for each network.

    Returns:
        The path of the report, one HTML file with all pictures inside.

    Raises:
        ValueError: `epochs` is not positive, or differs from the interrupted run.
        DownloadError: CIFAR-10 cannot be downloaded.
    """
    started = time.perf_counter()
    large = cifar10().changed(epochs=epochs, warmup_epochs=min(1, max(0, epochs - 1)))
    load(data)
    small = large.changed(kernels=_SMALL_KERNELS)
    outcomes = [
        _outcome("large kernels", large, output / "large", data),
        _outcome("3x3 kernels", small, output / "small", data),
    ]
    report = output / "report.html"
    write_text(report, _page(outcomes, (time.perf_counter() - started) / 60))
    return report


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _outcome(title: str, recipe: Recipe, folder: Path, data: Path | None) -> Outcome:
    _say(f"\ntraining the network with {title}, {recipe.epochs} epochs")
    weights = fit(recipe, folder, data, resume=(folder / "last.ckpt").exists())
    model, description = load_model(weights)
    save_model(merge(model), folder / "merged.safetensors", description)
    merged, _ = load_model(folder / "merged.safetensors")
    test = batches(evaluation_set("cifar10", data, description), 500)
    scores = evaluate(model, test), evaluate(merged, test)
    images = torch.cat([x for x, _ in test])
    with torch.inference_mode():
        difference = largest_difference(_logits(model, images), _logits(merged, images))
        one = images[:1].contiguous(memory_format=torch.channels_last)
        times = interleaved({"before": lambda: model(one), "after": lambda: merged(one)}, runs=40)
    _say(
        f"{title}: {100 * scores[0].top1:.2f} % before merging, {100 * scores[1].top1:.2f} % after; the logits "
        f"differ by at most {difference[0]:.1e} ({difference[1]:.1e} of their norm); "
        f"{times['before'].p50_ms:.2f} ms an image before, {times['after'].p50_ms:.2f} ms after"
    )
    curve = rows_of(folder / "metrics.json", CURVE)
    return Outcome(
        title=title,
        recipe=recipe,
        curve=curve,
        minutes=sum(row.get("seconds", 0.0) for row in curve) / 60,
        parameters=(_parameters(model), _parameters(merged)),
        scores=scores,
        difference=difference,
        times=times,
        field=effective_receptive_field(model, enlarged(data, _FIELD_PIXELS, _FIELD_IMAGES)),
    )


def _logits(model: StagedNet, images: Tensor) -> Tensor:
    return torch.cat([model(x.contiguous(memory_format=torch.channels_last)) for x in images.split(500)])


def _parameters(model: StagedNet) -> int:
    return sum(p.numel() for p in model.parameters())


def _page(outcomes: list[Outcome], minutes: float) -> str:
    large = outcomes[0]
    fields = plots.receptive_fields({f"{o.title}, {o.scores[0].top1:.1%}": o.field for o in outcomes})
    pictures = [
        ("Training", plots.as_html(plots.curves({o.title: o.curve for o in outcomes}), "training curves")),
        ("Effective receptive field", plots.as_html(fields, "receptive fields")),
        ("Confusion matrix", plots.as_html(plots.confusion(large.scores[1].confusion, CLASSES), "confusion matrix")),
    ]
    notes = {
        "Training": "Each epoch is scored with the running average of the weights, on the 10,000 test images.",
        "Effective receptive field": (
            f"Where the centre of the last feature map looks: rectified gradients on {_FIELD_IMAGES} test images "
            f"enlarged to {_FIELD_PIXELS} pixels, log scale (protocol of the paper). The solid square holds half of "
            "the map, the dotted one 99 %."
        ),
        "Confusion matrix": "The merged network with large kernels on the 10,000 test images.",
    }
    sections = "".join(f"<h2>{title}</h2><p>{notes[title]}</p>{picture}" for title, picture in pictures)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>replknet demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
</style>
<h1>A small RepLKNet on CIFAR-10</h1>
<p>Two networks, alike but for the kernels of their depthwise convolutions
({_sides(large.recipe)} and 3-3-3-3), trained with one recipe for {large.recipe.epochs} epochs on
{torch.get_num_threads()} threads; {minutes:.1f} minutes in all.</p>
{_table(outcomes)}
{sections}
<h2>Recipe</h2><pre>{html.escape(_recipe(large.recipe))}</pre>
</html>
"""


def _sides(recipe: Recipe) -> str:
    return "-".join(map(str, recipe.kernels or CONFIGS[recipe.model].kernels))


def _recipe(recipe: Recipe) -> str:
    return "\n".join(f"{key} = {value!r}" for key, value in recipe.plain.items())


def _table(outcomes: list[Outcome]) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("test accuracy before merging", [f"{o.scores[0].top1:.2%}" for o in outcomes]),
        ("test accuracy after merging", [f"{o.scores[1].top1:.2%}" for o in outcomes]),
        ("largest difference of a logit", [f"{o.difference[0]:.1e}" for o in outcomes]),
        ("relative L2 difference of the logits", [f"{o.difference[1]:.1e}" for o in outcomes]),
        ("parameters in training", [f"{o.parameters[0]:,}" for o in outcomes]),
        ("parameters merged", [f"{o.parameters[1]:,}" for o in outcomes]),
        ("one image before merging, ms", [f"{o.times['before'].p50_ms:.2f}" for o in outcomes]),
        ("one image after merging, ms", [f"{o.times['after'].p50_ms:.2f}" for o in outcomes]),
        ("training, minutes", [f"{o.minutes:.1f}" for o in outcomes]),
    ]
    for t in outcomes[0].field.sides:
        rows.append(
            (
                f"receptive field, share of the image that holds {t:.0%}",
                ["not reached" if (area := o.field.areas[t]) is None else f"{area:.1%}" for o in outcomes],
            )
        )
    head = "".join(f"<th>{o.title}</th>" for o in outcomes)
    body = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>" for name, values in rows)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"
