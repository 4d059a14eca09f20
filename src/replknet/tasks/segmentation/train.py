"""A recipe of a segmentation network, made ready."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from replknet.data.mask_transforms import ForEvaluation, ForTraining, Normalize
from replknet.data.masks import Classes, MaskSet, Pairs
from replknet.tasks.recipes import Hardware, SegmentationRecipe
from replknet.tasks.segmentation.files import SegmentationDescription, save_segmentation
from replknet.tasks.segmentation.heads import UperNet
from replknet.tasks.segmentation.infer import Inference, Segmentation
from replknet.train.backbones import backbone_of, load_backbone
from replknet.train.callbacks import Kept
from replknet.train.job import Job, built, network_options
from replknet.train.loaders import NORMALIZATIONS, Splits


def job(recipe: SegmentationRecipe, data: Path | None, hardware: Hardware) -> Job:
    """Network, data and task of a recipe.

    Raises:
        ValueError: no data is named, the backbone cannot be built so, or the checkpoint to start from does not fit.
        ImageError: the data is not as it should be.
    """
    if data is None:
        raise ValueError("this recipe trains on your images: name their folder or zip with --data")
    recipe.check_at_once(hardware.at_once(recipe.batch_size), hardware.processes)
    mean, std = NORMALIZATIONS[recipe.normalization]
    normalize = Normalize(mean, std)
    train = Pairs(recipe.dataset, data, "train")
    moved = ForTraining(recipe.crop, recipe.scale, recipe.ratio, normalize, recipe.largest_share)
    val = None
    if recipe.evaluate:
        val = MaskSet(Pairs(recipe.dataset, data, "val"), ForEvaluation(normalize))
    description = description_of(recipe, train.classes)
    model = create_network(recipe, description, hardware)
    if recipe.weights is not None:
        load_backbone(backbone_of(model, recipe.model), recipe.weights)
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Job(
        task=Segmentation(
            model,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            warmup_steps=recipe.warmup_samples // recipe.batch_size,
            weight_decay=recipe.weight_decay,
            backbone_lr=recipe.backbone_lr,
            inference=Inference(recipe.window, recipe.stride, scale=recipe.scale),
            compile=hardware.compile,
        ),
        # sizes differ, so one image at a time is scored
        sets=Splits(MaskSet(train, moved), val, train.classes.names, mean, std, 1.0, val_batch=1),
        epochs=recipe.epochs_of(len(train)),
        kept=Kept(partial(_save, description), description.build),
        score="val_miou",
        score_every=recipe.evaluate_every,
    )


def description_of(recipe: SegmentationRecipe, classes: Classes) -> SegmentationDescription:
    """What the network of a recipe is, for these classes."""
    mean, std = NORMALIZATIONS[recipe.normalization]
    return SegmentationDescription(
        backbone=recipe.model,
        network=network_options(recipe),
        classes=classes.names,
        palette=classes.palette,
        channels=recipe.channels,
        auxiliary_channels=recipe.auxiliary_channels,
        align_corners=recipe.align_corners,
        scale=recipe.scale,
        window=recipe.window,
        stride=recipe.stride,
        mean=mean,
        std=std,
    )


def create_network(recipe: SegmentationRecipe, description: SegmentationDescription, hardware: Hardware) -> UperNet:
    """The network of a recipe, untrained.

    Raises:
        ValueError: the backbone is none of ours, or cannot be built so.
    """
    build = partial(replace(description, network={}).build, drop_path_rate=recipe.drop_path)
    model = built(build, recipe.model, description.network)
    backbone_of(model, recipe.model).set_grad_checkpointing(hardware.grad_checkpointing)
    return model


def _save(description: SegmentationDescription, model: nn.Module, path: Path) -> None:
    save_segmentation(model, path, description)
