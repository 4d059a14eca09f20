"""A recipe of a classifier, made ready."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from replknet.models import Description, load_checkpoint, read_state_dict, save_model
from replknet.models.timm_model import StagedNet
from replknet.tasks.classification.infer import Classification
from replknet.tasks.recipes import Hardware, Recipe
from replknet.train.callbacks import Kept, PreciseBN
from replknet.train.job import Job, built, network_options
from replknet.train.loaders import Splits, splits


def job(recipe: Recipe, data: Path | None, hardware: Hardware) -> Job:
    """Network, data and task of a recipe.

    Raises:
        ValueError: the network is none of ours or cannot be built so, or the checkpoint to start from does not fit.
        ImageError, DownloadError: the data cannot be had.
    """
    sets = splits(recipe, data)
    model = _network(recipe, sets)
    model.set_grad_checkpointing(hardware.grad_checkpointing)
    description = Description(
        config=model.cfg,
        classes=sets.classes,
        num_classes=len(sets.classes),
        image_size=recipe.image_size,
        crop_pct=sets.crop_pct,
        mean=sets.mean,
        std=sets.std,
    )
    return Job(
        task=_task(recipe, model, sets, hardware.compile),
        sets=sets,
        epochs=recipe.epochs,
        kept=Kept(partial(_save, description), description.build),
        score="val_top1",
        # statistics before what keeps them
        callbacks=(PreciseBN(recipe.precise_bn),),
    )


def _save(description: Description, model: nn.Module, path: Path) -> None:
    assert isinstance(model, StagedNet)
    save_model(model, path, description)


def _network(recipe: Recipe, sets: Splits) -> StagedNet:
    # a name that networks of others do not know
    options = {"sync_bn": True} if recipe.sync_bn else {}
    model = create_network(recipe, len(sets.classes), **options)
    if not isinstance(model, StagedNet):
        raise ValueError(f"model must be one of replknet's, got {recipe.model!r}; `replknet info` lists them")
    if recipe.weights is not None:
        theirs = read_state_dict(recipe.weights).get("head.bias")
        same = theirs is not None and len(theirs) == len(sets.classes)
        load_checkpoint(model, recipe.weights, classifier=same)
    return model


def create_network(recipe: Recipe, classes: int, **options: Any) -> nn.Module:
    """The network of a recipe, untrained."""
    build = partial(timm.create_model, recipe.model, num_classes=classes, drop_path_rate=recipe.drop_path)
    return built(build, recipe.model, network_options(recipe) | options)


def _task(recipe: Recipe, model: StagedNet, sets: Splits, compile: bool) -> Classification:
    return Classification(
        model,
        num_classes=len(sets.classes),
        epochs=recipe.epochs,
        optimizer=recipe.optimizer,
        momentum=recipe.momentum,
        lr=recipe.lr,
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        label_smoothing=recipe.label_smoothing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        mixup_prob=recipe.mixup_prob,
        mixup_off_epoch=recipe.mixup_off_epoch,
        ema_decay=recipe.ema_decay,
        compile=compile,
    )
