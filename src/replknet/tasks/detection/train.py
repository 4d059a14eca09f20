"""A recipe of a detector, made ready."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from replknet.data.box_transforms import BoxSet, ForEvaluation, ForTraining, listed
from replknet.data.coco import CocoImages
from replknet.data.mask_transforms import Normalize
from replknet.tasks.detection.files import DetectionDescription, save_detection
from replknet.tasks.detection.infer import Detection
from replknet.tasks.recipes import DetectionRecipe, Hardware
from replknet.train.backbones import backbone_of, load_backbone
from replknet.train.callbacks import Kept
from replknet.train.job import Job, built, network_options
from replknet.train.loaders import NORMALIZATIONS, Splits


def job(recipe: DetectionRecipe, data: Path | None, hardware: Hardware) -> Job:
    """Network, data and task of a recipe.

    Raises:
        ValueError: no data is named, the backbone cannot be built so, or the checkpoint to start from does not fit.
        ImageError: the data is not as it should be.
    """
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder or zip with --data")
    if hardware.compile:
        raise ValueError("torch.compile takes no network whose shapes depend on what it finds; leave out --compile")
    mean, std = NORMALIZATIONS[recipe.normalization]
    normalize = Normalize(mean, std)
    train = _images(recipe, data, "train", empty=False)
    moved = ForTraining(recipe.scales, normalize, recipe.crop_scales, recipe.flip, recipe.distort)
    val = None
    if recipe.evaluate:
        val = BoxSet(_images(recipe, data, "val", empty=True), ForEvaluation(recipe.scale, normalize))
    description = DetectionDescription(
        detector=recipe.detector,
        backbone=recipe.model,
        network=network_options(recipe),
        classes=train.classes,
        channels=recipe.channels,
        scale=recipe.scale,
        mean=mean,
        std=std,
    )
    return Job(
        task=Detection(
            _network(recipe, description, hardware),
            classes=len(train.classes),
            masks=recipe.masks,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            warmup=recipe.warmup,
            warmup_start=recipe.warmup_start,
            warmup_steps=recipe.warmup_samples // recipe.batch_size,
            drops=[drop / recipe.samples for drop in recipe.drops],
            weight_decay=recipe.weight_decay,
            backbone_lr=recipe.backbone_lr,
        ),
        sets=Splits(BoxSet(train, moved), val, train.classes, mean, std, 1.0, val_batch=1, collate=listed),
        epochs=recipe.epochs_of(len(train)),
        kept=Kept(partial(_save, description), description.build),
        score="val_map",
        score_every=recipe.evaluate_every,
    )


def _images(recipe: DetectionRecipe, data: Path, split: str, empty: bool) -> CocoImages:
    images = CocoImages(data, split, masks=recipe.masks, malformed=recipe.malformed, empty=empty)
    if images.problems:
        print(f"left out of {split}: {'; '.join(map(str, images.problems))}", file=sys.stderr, flush=True)
    return images


def _network(recipe: DetectionRecipe, description: DetectionDescription, hardware: Hardware) -> nn.Module:
    build: Any = partial(description.build, drop_path_rate=recipe.drop_path)
    model = built(build, recipe.model, {})
    backbone = backbone_of(model, recipe.model)
    backbone.set_grad_checkpointing(hardware.grad_checkpointing)
    if recipe.weights is not None:
        load_backbone(backbone, recipe.weights)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if recipe.sync_bn else model


def _save(description: DetectionDescription, model: nn.Module, path: Path) -> None:
    save_detection(model, path, description)
