"""Training of detectors: loss, optimisation, and the job of a recipe."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from replknet.data.batches import Splits
from replknet.data.box_transforms import BoxSet, ForEvaluation, ForTraining, Targets, listed
from replknet.data.coco import CocoImages
from replknet.data.mask_transforms import Normalize
from replknet.data.transforms import NORMALIZATIONS
from replknet.tasks.detection.average_precision import AveragePrecision
from replknet.tasks.detection.files import DetectionDescription, save_detection
from replknet.tasks.detection.infer import found_in
from replknet.tasks.detection.recipes import DetectionOptions
from replknet.train.backbones import backbone_of, load_backbone
from replknet.train.callbacks import Kept
from replknet.train.hardware import Hardware
from replknet.train.job import Job, Train, built, check_unit, network_options, own_images
from replknet.train.optimisers import by_depth
from replknet.train.recipe import Recipe


class Detection(pl.LightningModule):
    """A detector in training: the sum of its losses, and a learning rate that falls in steps.

    Args:
        model: a detector.
        classes: number of classes.
        masks: whether masks are scored.
        optimizer: timm's name of the optimiser.
        lr: peak learning rate.
        warmup: "linear" raises the learning rate from `warmup_start`; "constant" keeps it there during the warm-up.
        warmup_start: learning rate at the start of the warm-up divided by the peak learning rate, from 0 to 1.
        warmup_steps: steps of warm-up.
        drops: shares of the training, from 0 to 1; after each of them the learning rate falls to a tenth.
        weight_decay: weight decay; biases and norms are exempt.
        backbone_lr: learning rate of the backbone divided by the learning rate of the heads.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        masks: bool,
        optimizer: str,
        lr: float,
        warmup: Literal["linear", "constant"] = "linear",
        warmup_start: float = 1e-3,
        warmup_steps: int = 0,
        drops: Sequence[float] = (),
        weight_decay: float,
        backbone_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer, self.lr, self.weight_decay, self.backbone_lr = optimizer, lr, weight_decay, backbone_lr
        self.warmup, self.warmup_start, self.warmup_steps, self.drops = warmup, warmup_start, warmup_steps, drops
        self.masks = masks
        self.precision = AveragePrecision(classes, masks)
        self.last_loss = torch.zeros(())

    @property
    def weights(self) -> nn.Module:
        """The network that is scored and kept."""
        return self.model

    def training_step(self, batch: tuple[list[Tensor], list[Targets]], index: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(*batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.last_loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        self.precision.reset()

    def validation_step(self, batch: tuple[list[Tensor], list[Targets]], index: int) -> None:
        images, targets = batch
        self.precision.update(found_in(self.model.eval(), images, targets), targets)

    def on_validation_epoch_end(self) -> None:
        found = self.precision.compute()
        # None if the data has no objects
        self.log("val_map", found.boxes.map or 0.0, prog_bar=True)
        self.log("val_map50", found.boxes.map50 or 0.0)
        if found.masks is not None:
            self.log("val_map_masks", found.masks.map or 0.0)

    def configure_optimizers(self) -> Any:
        optimiser = by_depth(
            self.model, "pyramid.backbone.", self.optimizer, self.lr, self.backbone_lr, self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        drops = [round(share * steps) for share in self.drops]

        def factor(step: int) -> float:
            rate = 0.1 ** sum(step >= drop for drop in drops)
            if step >= self.warmup_steps:
                return rate
            risen = step / self.warmup_steps if self.warmup == "linear" else 0.0
            return rate * (self.warmup_start + (1 - self.warmup_start) * risen)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _options(recipe: Recipe) -> DetectionOptions:
    assert isinstance(recipe.options, DetectionOptions)
    return recipe.options


def job(recipe: Recipe, data: Path | None, hardware: Hardware) -> Job:
    """The job of a recipe: network, data and optimisation.

    Raises:
        ValueError: `data` is missing, the hardware settings do not suit a detector, the backbone cannot be built, or
            the checkpoint to start from does not fit.
        ImageError: the data cannot be read, or has another layout.
    """
    data = own_images(data)
    if hardware.compile:
        raise ValueError("torch.compile takes no network whose shapes depend on what it finds; leave out --compile")
    if hardware.shard:
        raise ValueError("shard was never tried with a detector; leave out --shard")
    check_unit(recipe, "samples")
    assert recipe.samples is not None
    options = _options(recipe)
    mean, std = NORMALIZATIONS[recipe.normalization]
    normalize = Normalize(mean, std)
    train = _images(recipe, data, "train", empty=False)
    moved = ForTraining(options.scales, normalize, options.crop_scales, options.flip, options.distort)
    val = None
    if recipe.evaluate:
        val = BoxSet(_images(recipe, data, "val", empty=True), ForEvaluation(options.scale, normalize))
    description = DetectionDescription(
        detector=options.detector,
        backbone=recipe.model,
        network=network_options(recipe),
        classes=train.classes,
        channels=options.channels,
        scale=options.scale,
        mean=mean,
        std=std,
    )
    return Job(
        module=Detection(
            _network(recipe, description, hardware),
            classes=len(train.classes),
            masks=options.masks,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            warmup=options.warmup,
            warmup_start=options.warmup_start,
            warmup_steps=recipe.warmup_samples // recipe.batch_size,
            drops=[drop / recipe.samples for drop in options.drops],
            weight_decay=recipe.weight_decay,
            backbone_lr=options.backbone_lr,
        ),
        sets=Splits(BoxSet(train, moved), val, train.classes, mean, std, 1.0, val_batch=1, collate=listed),
        epochs=recipe.epochs_of(len(train)),
        kept=Kept(partial(_save, description), description.build),
        score="val_map",
        score_every=recipe.evaluate_every,
    )


def _images(recipe: Recipe, data: Path, split: str, empty: bool) -> CocoImages:
    images = CocoImages(data, split, masks=_options(recipe).masks, malformed=_options(recipe).malformed, empty=empty)
    if images.problems:
        print(f"left out of {split}: {'; '.join(map(str, images.problems))}", file=sys.stderr, flush=True)
    return images


def _network(recipe: Recipe, description: DetectionDescription, hardware: Hardware) -> nn.Module:
    build: Any = partial(description.build, drop_path_rate=recipe.drop_path)
    model = built(build, recipe.model, {})
    backbone = backbone_of(model, recipe.model)
    backbone.set_grad_checkpointing(hardware.grad_checkpointing)
    if recipe.weights is not None:
        load_backbone(backbone, recipe.weights)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if recipe.sync_bn else model


def _save(description: DetectionDescription, model: nn.Module, path: Path) -> None:
    save_detection(model, path, description)


TRAIN = Train(
    job=job,
    step=None,
    refusal=lambda recipe, hardware, images: None,
    # only estimates need these numbers, and detectors have no estimate
    training_set=lambda name, recipe: (None, None),
)
