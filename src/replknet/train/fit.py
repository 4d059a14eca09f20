"""A recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

import json
import logging
import os
import signal
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from replknet.models import Description, RepLKNet
from replknet.recipes import Recipe
from replknet.tasks.classification import Classification
from replknet.train.callbacks import KeepLast
from replknet.train.datasets import Splits, batches, splits
from replknet.train.memory import keep_freed_memory


class ResumeError(ValueError):
    """A training that cannot go on from where it is asked to; the text says why and what to do."""


def fit(recipe: Recipe, folder: Path, data: Path | None = None, resume: bool = False) -> Path:
    """Train a classifier; Ctrl-C keeps the state of that moment, and `resume` goes on from it.

    Args:
        recipe: what to train.
        folder: where the result goes: `model.safetensors` (weights with their description), `last.ckpt`
            (the state to go on from), `recipe.json` and `metrics.json` (a row an epoch).
        data: the folder of the images; for CIFAR-10 where it is kept, by default in the cache.
        resume: go on from `folder/last.ckpt`.

    Returns:
        The path of the weights.

    Raises:
        ResumeError: there is a result in the folder already and `resume` is not asked for, or there is
            none to go on from, or it is of another recipe.
        ImageError, DownloadError: the data cannot be had.
        KeyboardInterrupt: after the state was kept.
    """
    last = folder / "last.ckpt"
    _check_resume(last, recipe, resume)
    keep_freed_memory()
    pl.seed_everything(recipe.seed, verbose=False)
    sets = splits(recipe, data)
    model = _network(recipe, sets)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    description = Description(
        config=model.cfg,
        classes=sets.classes,
        num_classes=len(sets.classes),
        image_size=recipe.image_size,
        crop_pct=sets.crop_pct,
        mean=sets.mean,
        std=sets.std,
    )
    trainer = _trainer(recipe, KeepLast(folder, description, _plain(recipe)))
    before = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            _ignore_lightnings_advice()
            trainer.fit(
                _task(recipe, model, sets),
                batches(sets.train, recipe.batch_size, train=True, workers=recipe.workers),
                batches(sets.val, 2 * recipe.batch_size, workers=recipe.workers),
                ckpt_path=str(last) if resume else None,
                weights_only=True,
            )
    except SystemExit:
        # Lightning turns Ctrl-C into an exit, and ignores the signal from then on
        signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from None
    return folder / "model.safetensors"


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def _check_resume(last: Path, recipe: Recipe, resume: bool) -> None:
    if not resume:
        if last.exists():
            raise ResumeError(
                f"{last} has the state of an earlier training: --resume goes on with it, "
                "another --output starts a new one"
            )
        return
    if not last.exists():
        raise ResumeError(f"nothing to resume: there is no {last}")
    before = torch.load(last, map_location="cpu", weights_only=True, mmap=True).get("replknet_recipe")
    now = _plain(recipe)
    if before != now:
        differing = sorted(key for key in now if (before or {}).get(key) != now[key])
        told = ", ".join(f"{key} was {(before or {}).get(key)!r}, now {now[key]!r}" for key in differing)
        raise ResumeError(f"{last} is of another recipe ({told}); give the same options, or another --output")


def _network(recipe: Recipe, sets: Splits) -> RepLKNet:
    changes: dict[str, Any] = (
        {} if recipe.kernels is None else {"kernels": recipe.kernels, "small_kernel": _small(recipe.kernels)}
    )
    model = timm.create_model(recipe.model, num_classes=len(sets.classes), drop_path_rate=recipe.drop_path, **changes)
    if not isinstance(model, RepLKNet):
        raise ValueError(f"model must be one of replknet's, got {recipe.model!r}; `replknet info` lists them")
    return model


def _small(kernels: tuple[int, ...]) -> int | None:
    """The side of the small branch for other kernels than the network's own: 3, or none beside a 3x3."""
    return 3 if min(kernels) > 3 else None


def _task(recipe: Recipe, model: RepLKNet, sets: Splits) -> Classification:
    return Classification(
        model,
        num_classes=len(sets.classes),
        epochs=recipe.epochs,
        lr=recipe.lr,
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        label_smoothing=recipe.label_smoothing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        ema_decay=recipe.ema_decay,
    )


def _trainer(recipe: Recipe, keep: KeepLast) -> pl.Trainer:
    quiet = bool(os.environ.get("CI"))
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="auto",
        devices="auto",
        precision=recipe.precision,
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_grad,
        logger=False,
        callbacks=[keep] if quiet else [keep, TQDMProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not quiet,
        num_sanity_val_steps=0,
    )


def _ignore_lightnings_advice() -> None:
    for text in (
        ".*does not have many workers.*",  # two cores have none to spare
        ".*lr_scheduler.step.*",  # timm's schedulers count steps themselves
        ".*in eval mode at the start of training.*",  # the average of the weights always is
        ".*LeafSpec.*",  # Lightning 2.6 uses what torch 2.14 deprecates
        ".*mid-epoch.*",  # an interrupted epoch goes on with other images of the same set
    ):
        warnings.filterwarnings("ignore", text)
