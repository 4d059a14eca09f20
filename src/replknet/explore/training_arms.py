"""Arms that train a network, from a recipe."""

import json
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
from replknet.train.job import TrainStep
from replknet.train.recipe import Recipe

# fields that recipes have gained since the first records were kept, with their defaults
_LATER = {"classification": {"evaluate_every": 1}, "segmentation": {}}


def trained(name: str, recipe: Recipe, images: int, seeds: int, start: Arm | None = None) -> Arm:
    """An arm whose runs train a network and score it.

    Its figures are `score` (top-1, or mIoU; from 0 to 1), `train_loss` (of the last epoch, nats), `parameters` and
    `multiply_adds` (merged; of one image of the size that is trained on), and `epoch_seconds`.

    Args:
        name: of the arm.
        recipe: the training; its seed is replaced by the run's.
        images: in the training set, for the estimate of its time.
        seeds: runs.
        start: an arm whose network this one starts from.
    """
    configuration = {key: value for key, value in recipe.plain.items() if key != "seed"}
    for field, default in _LATER[recipe.task].items():
        # records of before there was such a field stay those of the same run
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
    """The scores of arms that train a network, a dot a seed."""
    return plots.seeds({arm.name: [100 * v for v in results.values(arm.name, "score")] for arm in arms}, label)


def _train(recipe: Recipe, start: Arm | None, seed: int, folder: Path, site: Site) -> Figures:
    recipe = recipe.changed(seed=seed)
    if start is not None:
        recipe = recipe.changed(weights=str(site.folder(start, seed) / "model.safetensors"))
    kind = _KINDS[type(recipe.options)]
    data = kind.data(site)
    weights = fit(recipe, folder, data, resume=(folder / "last.ckpt").exists(), hardware=site.hardware)
    rows = json.loads((folder / "metrics.json").read_text())
    figures = kind.figures(recipe, rows, weights, site)
    # what it would go on from is many times as large as the weights, and the training has ended
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
    # CamVid's val shares a drive with its train; the others' test has no masks to score with
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
    """What is different between trainings of different tasks."""

    data: Callable[[Site], Path | None]
    figures: Callable[[Recipe, list[dict[str, float]], Path, Site], Figures]


_KINDS: dict[type[Any], _Kind] = {
    ClassificationOptions: _Kind(lambda site: site.images, _classified),
    SegmentationOptions: _Kind(lambda site: site.masks, _segmented),
}
# pixels of the steps that are timed on a CPU, at most, but for two images
_TIMED = 32 * 32**2


def _estimate(recipe: Recipe, images: int, site: Site) -> float:
    """Seconds of a training: some of its steps, timed, times their number."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at_once = site.hardware.at_once(recipe.batch_size)
    if device.type == "cpu":
        # a whole step of a large network may not fit
        at_once = min(at_once, max(2, _TIMED // math.prod(recipe.options.size)))
    train = TASKS[recipe.task].train
    assert train.step is not None
    _, classes = train.training_set("", recipe)
    # those of CamVid where the recipe leaves them open
    step = train.step(recipe, site.hardware, at_once, classes or 11)
    model, x, target = step.model.to(device), step.x.to(device), step.target.to(device)
    model.to(memory_format=torch.channels_last)
    # the first one warms up
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
