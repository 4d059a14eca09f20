"""Training of classifiers: loss, optimisation, and the job of a recipe."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from replknet.data.batches import Splits
from replknet.data.published import CLASSES, IMAGES
from replknet.models import Description, load_checkpoint, read_state_dict, save_model
from replknet.models.timm_model import StagedNet
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.tasks.classification.sets import splits
from replknet.train.callbacks import Kept, PreciseBN
from replknet.train.hardware import Hardware
from replknet.train.job import Job, Train, TrainStep, built, check_unit, network_options
from replknet.train.optimisers import fallback_of
from replknet.train.recipe import Recipe
from replknet.train.sharding import gather, shard


class Classification(pl.LightningModule):
    """A classifier in training: timm's losses, mixing, optimiser, schedule and weight average.

    Args:
        model: images `[N,3,H,W]` to logits `[N,classes]`.
        num_classes: number of outputs.
        epochs: length of the schedule.
        optimizer: timm's name of the optimiser. Muon updates the dense matrices inside the network, and AdamW the rest.
        momentum: momentum of the optimisers that have one.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: weight decay; biases and norms are exempt.
        layer_decay: learning rate of a layer group divided by the learning rate of the next group; None: all equal.
        label_smoothing: probability that is spread over all classes.
        mixup: alpha of mixup; 0: no mixup.
        cutmix: alpha of CutMix; 0: no CutMix.
        mixup_prob: share of the batches that are mixed.
        mixup_off_epoch: first epoch without mixing; 0: all epochs mix.
        ema_decay: decay of the running average of the weights. The average is kept. Validation scores the average
            (val_top1) and the current weights (val_top1_raw). None: no average.
        compile: whether to train through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        epochs: int,
        optimizer: str = "adamw",
        momentum: float = 0.9,
        lr: float,
        min_lr: float = 1e-6,
        warmup_epochs: float = 0,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_off_epoch: int = 0,
        ema_decay: float | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        # a tuple, so that state_dict() does not list the weights a second time
        self._trained = (torch.compile(self.model) if compile else self.model,)
        self.epochs, self.warmup_epochs = epochs, warmup_epochs
        self.optimizer, self.momentum = optimizer, momentum
        self.lr, self.min_lr = lr, min_lr
        self.weight_decay, self.layer_decay = weight_decay, layer_decay
        self.mix: Mixup | None = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(label_smoothing)
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            self.loss = SoftTargetCrossEntropy()
        self.mixup_off_epoch = mixup_off_epoch
        self.last_loss = torch.zeros(())
        # the decay grows with the steps: in a short training a long average would keep the initial weights
        self.ema = None if ema_decay is None else ModelEmaV3(self.model, decay=ema_decay, use_warmup=True)
        if self.ema is not None:
            # else DDP would wait for gradients of the average
            self.ema.requires_grad_(False)

    def configure_model(self) -> None:
        # Lightning calls this under each strategy; only sharding sets a mesh
        shard(self.model, getattr(self, "_device_mesh", None))

    @property
    def weights(self) -> nn.Module:
        """The network that is scored and kept: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, target = batch
        if self.mix is not None:
            self.mix.mixup_enabled = self.mixup_off_epoch == 0 or self.current_epoch < self.mixup_off_epoch
            x, target = self.mix(x, target)
        loss: Tensor = self.loss(self._trained[0](x.contiguous(memory_format=torch.channels_last)), target)
        self.log("loss", loss, prog_bar=True)
        self.last_loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.ema.update(self.model, step=self.global_step)

    def on_validation_epoch_start(self) -> None:
        gather(self.model, True)
        # columns: images, right answers, sum of the losses; rows: averaged weights if there are any, current weights
        self._scored = torch.zeros(1 if self.ema is None else 2, 3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor] | None, index: int) -> None:
        if batch is None:
            # all images of the batch were unreadable
            return
        x, target = batch
        for model, scored in zip((self.weights, self.model), self._scored, strict=False):
            logits = model.eval()(x.contiguous(memory_format=torch.channels_last)).float()
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            right = (logits.argmax(1) == target).sum()
            scored += torch.stack([torch.full_like(loss, len(x)), right, loss]).double()

    def on_validation_epoch_end(self) -> None:
        gather(self.model, False)
        # each process scored other images
        all_scored = self.trainer.strategy.reduce(self._scored, reduce_op="sum").tolist()
        for (images, right, loss), of in zip(all_scored, ("", "_raw"), strict=False):
            self.log(f"val_loss{of}", loss / images)
            self.log(f"val_top1{of}", right / images, prog_bar=not of)

    def configure_optimizers(self) -> Any:
        optimiser = create_optimizer_v2(
            self.model,
            self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            **fallback_of(self.model, self.optimizer),
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches) // self.epochs)
        scheduler, _ = create_scheduler_v2(
            optimiser,
            "cosine",
            num_epochs=self.epochs,
            min_lr=self.min_lr,
            warmup_lr=0.0,
            warmup_epochs=self.warmup_epochs,  # type: ignore[arg-type]  # timm takes fractions of epochs, too
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        scheduler.step_update(0)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # timm's schedulers need the number of the step
        scheduler.step_update(self.global_step)


def _options(recipe: Recipe) -> ClassificationOptions:
    assert isinstance(recipe.options, ClassificationOptions)
    return recipe.options


def job(recipe: Recipe, data: Path | None, hardware: Hardware) -> Job:
    """The job of a recipe: network, data and optimisation.

    Raises:
        ValueError: the network is not replknet's or cannot be built, or the checkpoint to start from does not fit.
        ImageError, DownloadError: the data cannot be read or downloaded.
    """
    _check(recipe, hardware)
    sets = splits(recipe, data)
    model = _network(recipe, sets)
    model.set_grad_checkpointing(hardware.grad_checkpointing)
    description = Description(
        config=model.cfg,
        classes=sets.classes,
        num_classes=len(sets.classes),
        image_size=_options(recipe).image_size,
        crop_pct=sets.crop_pct,
        mean=sets.mean,
        std=sets.std,
    )
    return Job(
        module=_module(recipe, model, sets, hardware.compile),
        sets=sets,
        epochs=recipe.epochs_of(len(sets.train)),
        kept=Kept(partial(_save, description), description.build),
        score="val_top1",
        score_every=recipe.evaluate_every,
        # fit() runs these before the callback that writes the network
        callbacks=(PreciseBN(_options(recipe).precise_bn),),
    )


def _save(description: Description, model: nn.Module, path: Path) -> None:
    assert isinstance(model, StagedNet)
    save_model(model, path, description)


def _network(recipe: Recipe, sets: Splits) -> StagedNet:
    # only if needed: networks of timm's do not know this option
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


def _module(recipe: Recipe, model: StagedNet, sets: Splits, compile: bool) -> Classification:
    options = _options(recipe)
    return Classification(
        model,
        num_classes=len(sets.classes),
        epochs=recipe.epochs_of(len(sets.train)),
        optimizer=recipe.optimizer,
        momentum=options.momentum,
        lr=recipe.lr,
        min_lr=options.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        weight_decay=recipe.weight_decay,
        layer_decay=options.layer_decay,
        label_smoothing=options.label_smoothing,
        mixup=options.mixup,
        cutmix=options.cutmix,
        mixup_prob=options.mixup_prob,
        mixup_off_epoch=options.mixup_off_epoch,
        ema_decay=options.ema_decay,
        compile=compile,
    )


def _check(recipe: Recipe, hardware: Hardware) -> None:
    check_unit(recipe, "epochs")
    if hardware.shard and _options(recipe).ema_decay is not None:
        raise ValueError(
            "shard cannot keep an average of the weights (ema_decay): timm's average copies whole weights, and each "
            "process has only a share; give --ema-decay null, or leave out --shard"
        )


def _step(recipe: Recipe, hardware: Hardware, images: int, classes: int) -> TrainStep:
    model = create_network(recipe, classes)
    assert isinstance(model, StagedNet)
    model.set_grad_checkpointing(hardware.grad_checkpointing)
    x = torch.zeros(images, model.in_chans, *recipe.options.size).contiguous(memory_format=torch.channels_last)
    target = torch.full((images, classes), 1 / classes)
    return TrainStep(model, x, target, _soft_cross_entropy, average=_options(recipe).ema_decay is not None)


def _soft_cross_entropy(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return -(model(x).float().log_softmax(1) * target).sum(1).mean()


def _training_set(name: str, recipe: Recipe) -> tuple[int | None, int | None]:
    dataset: str = _options(recipe).dataset
    if dataset == "folder":
        # only the recipes for ImageNet-22K do not evaluate
        dataset = "imagenet1k" if recipe.evaluate else "imagenet22k"
    # the recipe `folder` does not know its images and classes: the number of classes is a guess
    return None if name == "folder" else IMAGES[dataset], CLASSES[dataset]


TRAIN = Train(job=job, step=_step, refusal=lambda recipe, hardware, images: None, training_set=_training_set)
