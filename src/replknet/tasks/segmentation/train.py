"""Training of segmentation networks: loss, optimisation, and the job of a recipe."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replknet.data.batches import Splits
from replknet.data.mask_transforms import ForEvaluation, ForTraining, Normalize
from replknet.data.masks import IGNORE, Classes, MaskSet, Pairs, shipped_classes
from replknet.data.published import IMAGES
from replknet.data.transforms import NORMALIZATIONS
from replknet.tasks.segmentation.files import SegmentationDescription, save_segmentation
from replknet.tasks.segmentation.heads import UperNet
from replknet.tasks.segmentation.infer import Inference, confusion_of, scores
from replknet.tasks.segmentation.recipes import SegmentationOptions
from replknet.train.backbones import backbone_of, load_backbone
from replknet.train.callbacks import Kept
from replknet.train.hardware import Hardware
from replknet.train.job import Job, Train, TrainStep, built, check_unit, network_options, own_images
from replknet.train.optimisers import by_depth
from replknet.train.recipe import Recipe
from replknet.train.sharding import gather, shard

# weight of the auxiliary head's loss; the other head's loss has weight 1
_AUXILIARY_WEIGHT = 0.4


class Segmentation(pl.LightningModule):
    """A segmentation network in training: cross entropy of both heads, and a learning rate that falls linearly.

    Args:
        model: a UperNet with or without an auxiliary head.
        optimizer: timm's name of the optimiser.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        weight_decay: weight decay; biases and norms are exempt.
        backbone_lr: learning rate of the backbone divided by the learning rate of the heads.
        inference: how validation runs the network.
        compile: whether to train through torch.compile.
    """

    def __init__(
        self,
        model: UperNet,
        *,
        optimizer: str,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        backbone_lr: float = 1.0,
        inference: Inference,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        # a tuple, so that state_dict() does not list the weights a second time
        self._trained = (torch.compile(self.model) if compile else self.model,)
        self.optimizer, self.lr, self.warmup_steps = optimizer, lr, warmup_steps
        self.weight_decay, self.backbone_lr, self.inference = weight_decay, backbone_lr, inference
        self.last_loss = torch.zeros(())

    @property
    def weights(self) -> nn.Module:
        """The network that is scored and kept."""
        return self.model

    def configure_model(self) -> None:
        # Lightning calls this under each strategy; only sharding sets a mesh
        shard(self.model, getattr(self, "_device_mesh", None))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, mask = batch
        loss = training_loss(
            self._trained[0],
            x.contiguous(memory_format=torch.channels_last),
            mask,
            self.model.auxiliary_head is not None,
        )
        self.log("loss", loss, prog_bar=True)
        self.last_loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        gather(self.model, True)
        classes = self.model.num_classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, mask = batch
        predicted = self.inference(
            self.model.eval(), x.contiguous(memory_format=torch.channels_last), (mask.shape[-2], mask.shape[-1])
        )
        self._confusion += confusion_of(predicted, mask, self.model.num_classes)

    def on_validation_epoch_end(self) -> None:
        gather(self.model, False)
        # each process scored other images; float64 holds these counts exactly
        total = self.trainer.strategy.reduce(self._confusion.double(), reduce_op="sum").long()
        found = scores(total.cpu(), 0)
        self.log("val_miou", found.miou, prog_bar=True)
        self.log("val_accuracy", found.accuracy)

    def configure_optimizers(self) -> Any:
        optimiser = by_depth(self.model, "backbone.", self.optimizer, self.lr, self.backbone_lr, self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            rising = 1.0 if step >= self.warmup_steps else max(1e-6, step / self.warmup_steps)
            return rising * max(0.0, 1 - step / steps)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def training_loss(model: Callable[..., Any], x: Tensor, mask: Tensor, auxiliary: bool) -> Tensor:
    """Cross entropy of a UperNet, plus 0.4 times the cross entropy of its auxiliary head if it has one.

    Args:
        model: the network.
        x: normalised images `[N,3,H,W]`.
        mask: class of each pixel `[N,H,W]`, uint8, or IGNORE.
        auxiliary: whether the network has an auxiliary head.
    """
    target = mask.long()
    if not auxiliary:
        return _loss(model(x), target)
    logits, others = model(x, auxiliary=True)
    return _loss(logits, target) + _AUXILIARY_WEIGHT * _loss(others, target)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, averaged over all pixels as in mmsegmentation 0.x; pixels without a label add 0."""
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum") / target.numel()


def _options(recipe: Recipe) -> SegmentationOptions:
    assert isinstance(recipe.options, SegmentationOptions)
    return recipe.options


def job(recipe: Recipe, data: Path | None, hardware: Hardware) -> Job:
    """The job of a recipe: network, data and optimisation.

    Raises:
        ValueError: `data` is missing, a process has too few crops at once, the backbone cannot be built, or the
            checkpoint to start from does not fit.
        ImageError: the data cannot be read, or has another layout.
    """
    data = own_images(data)
    refused = _refusal(recipe, hardware, hardware.at_once(recipe.batch_size))
    if refused is not None:
        raise ValueError(refused)
    check_unit(recipe, "samples")
    options = _options(recipe)
    mean, std = NORMALIZATIONS[recipe.normalization]
    normalize = Normalize(mean, std)
    train = Pairs(options.dataset, data, "train")
    moved = ForTraining(options.crop, options.scale, options.ratio, normalize, options.largest_share)
    val = None
    if recipe.evaluate:
        val = MaskSet(Pairs(options.dataset, data, "val"), ForEvaluation(normalize))
    description = description_of(recipe, train.classes)
    model = create_network(recipe, description, hardware)
    if recipe.weights is not None:
        load_backbone(backbone_of(model, recipe.model), recipe.weights)
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Job(
        module=Segmentation(
            model,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            warmup_steps=recipe.warmup_samples // recipe.batch_size,
            weight_decay=recipe.weight_decay,
            backbone_lr=options.backbone_lr,
            inference=Inference(
                options.window, options.stride, scale=options.scale, align_corners=options.align_corners
            ),
            compile=hardware.compile,
        ),
        # images differ in size, so validation takes one at a time
        sets=Splits(MaskSet(train, moved), val, train.classes.names, mean, std, 1.0, val_batch=1),
        epochs=recipe.epochs_of(len(train)),
        kept=Kept(partial(_save, description), description.build),
        score="val_miou",
        score_every=recipe.evaluate_every,
    )


def description_of(recipe: Recipe, classes: Classes) -> SegmentationDescription:
    """The description of a recipe's network, for these classes."""
    options = _options(recipe)
    mean, std = NORMALIZATIONS[recipe.normalization]
    return SegmentationDescription(
        backbone=recipe.model,
        network=network_options(recipe),
        classes=classes.names,
        palette=classes.palette,
        channels=options.channels,
        auxiliary_channels=options.auxiliary_channels,
        align_corners=options.align_corners,
        scale=options.scale,
        window=options.window,
        stride=options.stride,
        mean=mean,
        std=std,
    )


def create_network(recipe: Recipe, description: SegmentationDescription, hardware: Hardware) -> UperNet:
    """The network of a recipe, untrained.

    Raises:
        ValueError: the backbone is not replknet's, or cannot be built.
    """
    build = partial(replace(description, network={}).build, drop_path_rate=recipe.drop_path)
    model = built(build, recipe.model, description.network)
    backbone_of(model, recipe.model).set_grad_checkpointing(hardware.grad_checkpointing)
    return model


def _save(description: SegmentationDescription, model: nn.Module, path: Path) -> None:
    save_segmentation(model, path, description)


def _refusal(recipe: Recipe, hardware: Hardware, images: int) -> str | None:
    """Why a process cannot train on so few crops at once, or None.

    UperNet pools a map to one pixel. A batch norm cannot compute a variance from one such pixel.
    """
    if images > 1 or (recipe.sync_bn and hardware.processes > 1):
        return None
    return (
        "a process takes one crop at once, and a batch norm needs two, since UperNet pools each to one pixel: give a "
        "larger --batch-size or --device-batch, or --sync-bn true on several GPUs"
    )


def _step(recipe: Recipe, hardware: Hardware, images: int, classes: int) -> TrainStep:
    # only the number of classes matters for memory: names and colours are made up
    some = Classes(tuple(map(str, range(classes))), ((0, 0, 0),) * classes)
    model = create_network(recipe, description_of(recipe, some), hardware)
    if images == 1:
        # batch norms refuse a single pixel in training mode; eval mode takes equal memory
        model.decode_head.psp_modules.eval()
    x = torch.zeros(images, 3, *recipe.options.size).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(images, *recipe.options.size, dtype=torch.uint8)
    return TrainStep(model, x, mask, lambda net, a, b: training_loss(net, a, b, model.auxiliary_head is not None))


def _training_set(name: str, recipe: Recipe) -> tuple[int | None, int | None]:
    dataset = _options(recipe).dataset
    if dataset not in IMAGES:
        return None, None
    return IMAGES[dataset], len(shipped_classes(dataset).names)


TRAIN = Train(job=job, step=_step, refusal=_refusal, training_set=_training_set)
