"""Arms that train a network from a recipe."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replknet.analysis import cost, plots
from replknet.data.batches import batches
from replknet.explore.experiment import Arm, Column, Figures, Results, Site
from replknet.kernels.malloc import keep_freed_memory
from replknet.models import load_model
from replknet.nn import merge
from replknet.tasks import TASKS
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.tasks.segmentation.recipes import SegmentationOptions
from replknet.tasks.training import fit
from replknet.train.estimate import autocast
from replknet.train.files import CURVE, rows_of
from replknet.train.job import TrainStep
from replknet.train.recipe import Recipe

# task -> fields that its recipes got after the first records were kept, and their defaults
_LATER = {"classification": {"evaluate_every": 1}, "segmentation": {}}


def trained(name: str, recipe: Recipe, images: int, seeds: int, start: Arm | None = None) -> Arm:
    """An arm whose runs train a network and score it.

    Its figures are `score` (top-1 or mIoU, from 0 to 1), `train_loss` (last epoch, nats), `parameters` and
    `multiply_adds` (merged, one image in the training size), and `epoch_seconds`.

    Args:
        name: name of the arm.
        recipe: the training; the seed of each run replaces its seed.
        images: number of training images, for the estimate of the time.
        seeds: number of runs.
        start: arm that trains the network to start from; None: no start.
    """
    configuration = {key: value for key, value in recipe.plain.items() if key != "seed"}
    for field, default in _LATER[recipe.task].items():
        # without the default value the key stays equal, so that older records still belong to this arm
        if configuration[field] == default:
            del configuration[field]
    if start is not None:
        configuration["weights"] = f"of the run {start.key}"
    return Arm(
        name=name,
        configuration=configuration,
        run=partial(_train, recipe, start),
        seconds=partial(_estimate, recipe, images),
        seeds=seeds,
        needs=() if start is None else (start,),
    )


def score_columns(title: str, paper: dict[str, float]) -> tuple[Column, ...]:
    """Columns of the table of arms that train a network."""
    return (
        Column(figure="score", title=title, scale=100, paper=paper),
        Column(figure="train_loss", title="training loss, nats", digits=3),
        Column(figure="parameters", title="parameters, M", scale=1e-6, digits=3),
        Column(figure="multiply_adds", title="multiply-adds, M", scale=1e-6, digits=1),
    )


def draw_scores(arms: tuple[Arm, ...], results: Results, label: str) -> Any:
    """A plot of the scores of arms that train a network, one dot a seed."""
    return plots.seeds({arm.name: [100 * v for v in results.values(arm.name, "score")] for arm in arms}, label)


def _train(recipe: Recipe, start: Arm | None, seed: int, folder: Path, site: Site) -> Figures:
    recipe = recipe.changed(seed=seed)
    if start is not None:
        recipe = recipe.changed(weights=str(site.folder(start, seed) / "model.safetensors"))
    kind = _KINDS[type(recipe.options)]
    data = kind.data(site)
    weights = fit(recipe, folder, data, resume=(folder / "last.ckpt").exists(), hardware=site.hardware)
    rows = rows_of(folder / "metrics.json", CURVE)
    figures = kind.figures(recipe, rows, weights, site)
    # the training has ended, and the state to go on from is many times as large as the weights
    (folder / "last.ckpt").unlink(missing_ok=True)
    return {
        **figures,
        "train_loss": rows[-1]["train_loss"],
        "epoch_seconds": sum(row["seconds"] for row in rows) / len(rows),
    }


def _classified(recipe: Recipe, rows: list[dict[str, float]], weights: Path, site: Site) -> Figures:
    model, description = load_model(weights)
    counted = cost(merge(model), description.image_size)
    return {
        "score": rows[-1]["val_top1"],
        "parameters": counted.parameters,
        "multiply_adds": counted.multiply_adds,
    }


def _segmented(recipe: Recipe, rows: list[dict[str, float]], weights: Path, site: Site) -> Figures:
    from replknet.data.mask_transforms import ForEvaluation
    from replknet.data.masks import MaskSet, Pairs
    from replknet.tasks.segmentation.files import load_segmentation
    from replknet.tasks.segmentation.heads import without_auxiliary
    from replknet.tasks.segmentation.infer import evaluate, inference_of

    assert site.masks is not None  # the training would have failed
    model, description = load_segmentation(weights, torch.float32)
    # CamVid's val comes from a drive that is also in train; other data sets have no masks for test
    assert isinstance(recipe.options, SegmentationOptions)
    split = "test" if recipe.options.dataset == "masks" else "val"
    pairs = Pairs(recipe.options.dataset, site.masks, split)
    loader = batches(MaskSet(pairs, ForEvaluation(description.normalize)), 1)
    scores = evaluate(model, loader, len(description.classes), inference_of(description))
    counted = cost(merge(without_auxiliary(model)), recipe.options.size)
    return {
        "score": scores.miou,
        "accuracy": scores.accuracy,
        "iou": dict(zip(description.classes, scores.iou, strict=True)),
        "parameters": counted.parameters,
        "multiply_adds": counted.multiply_adds,
    }


@dataclass(frozen=True)
class _Kind:
    """The parts of a training arm that depend on the task."""

    data: Callable[[Site], Path | None]
    figures: Callable[[Recipe, list[dict[str, float]], Path, Site], Figures]


_KINDS: dict[type[Any], _Kind] = {
    ClassificationOptions: _Kind(lambda site: site.images, _classified),
    SegmentationOptions: _Kind(lambda site: site.masks, _segmented),
}
# largest number of pixels in a step that is timed on a CPU; a step has at least two images
_TIMED = 32 * 32**2


def _estimate(recipe: Recipe, images: int, site: Site) -> float:
    """Seconds of a training: the time of one step, times the number of steps."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at_once = site.hardware.at_once(recipe.batch_size)
    if device.type == "cpu":
        # a whole step of a large network may not fit
        at_once = min(at_once, max(2, _TIMED // math.prod(recipe.options.size)))
    train = TASKS[recipe.task].train
    assert train.step is not None
    _, classes = train.training_set("", recipe)
    # 11, as in CamVid, if the number of classes depends on the data
    step = train.step(recipe, site.hardware, at_once, classes or 11)
    model, x, target = step.model.to(device), step.x.to(device), step.target.to(device)
    model.to(memory_format=torch.channels_last)
    # the first step warms up
    _, seconds = (_timed(replace(step, model=model, x=x, target=target), recipe.precision) for _ in range(2))
    return seconds * recipe.epochs_of(images) * images / (at_once * site.hardware.processes)


def _timed(step: TrainStep, precision: str) -> float:
    start = time.perf_counter()
    with autocast(precision, step.x.device.type):
        loss = step.loss(step.model, step.x, step.target)
    loss.backward()
    if step.x.is_cuda:
        torch.cuda.synchronize()
    step.model.zero_grad()
    return time.perf_counter() - start
