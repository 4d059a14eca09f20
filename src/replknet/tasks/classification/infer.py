"""Image classification: loss and optimisation for training, scores, and predictions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from replknet.train.sharding import gather, shard


class Classification(pl.LightningModule):
    """A classifier in training: timm's losses, mixing, optimiser, schedule and weight average.

    Args:
        model: images `[N,3,H,W]` to logits `[N,classes]`.
        num_classes: number of outputs.
        epochs: length of the schedule.
        optimizer: timm's name of it; Muon leaves what is no dense matrix inside the network to AdamW.
        momentum: of optimizers that have one.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: decay of weights; biases and norms are exempt.
        layer_decay: factor of the learning rate from one layer group to the one before it, or None.
        label_smoothing: probability spread over all classes.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        mixup_prob: share of the batches that are mixed.
        mixup_off_epoch: epoch from which none is mixed; 0 for never.
        ema_decay: decay of the average of the weights, which is then what is kept; validation scores it (val_top1) and
            the network beside it (val_top1_raw). None for none.
        compile: train through torch.compile.
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
        # in a tuple, since as a child of its own it would double the weights' names
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
        # a short training would never reach a long average, so its decay grows with the steps
        self.last_loss = torch.zeros(())
        self.ema = None if ema_decay is None else ModelEmaV3(self.model, decay=ema_decay, use_warmup=True)
        if self.ema is not None:
            # DDP would wait for its gradients
            self.ema.requires_grad_(False)

    def configure_model(self) -> None:
        # Lightning calls it under each strategy; a mesh is there if the weights are to be divided
        shard(self.model, getattr(self, "_device_mesh", None))

    @property
    def weights(self) -> nn.Module:
        """The network to be scored and kept: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, target = batch
        if self.mix is not None:
            self.mix.mixup_enabled = self.mixup_off_epoch == 0 or self.current_epoch < self.mixup_off_epoch
            x, target = self.mix(x, target)
        loss: Tensor = self.loss(self._trained[0](_channels_last(x)), target)
        self.log("loss", loss, prog_bar=True)
        self.last_loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema is not None and (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.ema.update(self.model, step=self.global_step)

    def on_validation_epoch_start(self) -> None:
        gather(self.model, True)
        # of what is kept, and of the network beside its average: images, those that were right, and the sum of losses
        self._scored = torch.zeros(1 if self.ema is None else 2, 3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor] | None, index: int) -> None:
        if batch is None:
            # all of its images were unreadable
            return
        x, target = batch
        for model, scored in zip((self.weights, self.model), self._scored, strict=False):
            logits = model.eval()(_channels_last(x)).float()
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            right = (logits.argmax(1) == target).sum()
            scored += torch.stack([torch.full_like(loss, len(x)), right, loss]).double()

    def on_validation_epoch_end(self) -> None:
        gather(self.model, False)
        # each image is with one process
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
            warmup_epochs=self.warmup_epochs,  # type: ignore[arg-type]  # timm takes parts of epochs as well
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        scheduler.step_update(0)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # timm's schedulers take the number of the step
        scheduler.step_update(self.global_step)


def fallback_of(model: nn.Module, optimizer: str) -> dict[str, Any]:
    """The option that tells timm what AdamW moves beside an optimiser for matrices; none for others."""
    return {"fallback_list": _no_inner_matrices(model)} if "muon" in optimizer else {}


def _no_inner_matrices(model: nn.Module) -> list[str]:
    """Parameters that Muon is not for: anything but the weights of dense convolutions and linear layers, and of
    those the first and the last (Jordan 2024, "Muon: An optimizer for hidden layers in neural networks")."""
    dense = [name for name, p in model.named_parameters() if p.ndim > 1 and p.shape[1] > 1]
    inner = set(dense[1:-1])
    return [name for name, _ in model.named_parameters() if name not in inner]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Scores:
    """How well a network classifies a data set; shares are from 0 to 1."""

    images: int
    top1: float
    top5: float | None  # None for five classes or fewer
    loss: float  # mean cross entropy, nats
    per_class: list[float]  # share of each class's images that were right
    confusion: list[list[int]]  # images of the row's class that were taken for the column's


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | None]) -> Scores:
    """Score a network, in eval mode, on batches of images `[N,3,H,W]` and labels `[N]`; None is skipped.

    Raises:
        ValueError: there is no image, or a label that the network has no output for.
    """
    model = model.eval()
    logits, labels = [], []
    for x, target in filter(None, batches):
        logits.append(model(_channels_last(x)).float())
        labels.append(target)
    if not logits:
        raise ValueError("no images to evaluate")
    y, t = torch.cat(logits), torch.cat(labels)
    classes = y.shape[1]
    if int(t.max()) >= classes:
        raise ValueError(f"the data set has a class {int(t.max())}, the network has {classes} outputs")
    confusion = multiclass_confusion_matrix(y.argmax(1), t, classes)
    top5 = None if classes <= 5 else (y.topk(5).indices == t[:, None]).any(1).double().mean().item()
    return Scores(
        images=len(t),
        top1=(y.argmax(1) == t).double().mean().item(),
        top5=top5,
        loss=nn.functional.cross_entropy(y, t).item(),
        per_class=(confusion.diag() / confusion.sum(1).clamp(min=1)).tolist(),
        confusion=confusion.tolist(),
    )


@dataclass(frozen=True)
class Guess:
    """One of the likeliest classes of an image."""

    label: int
    name: str
    probability: float


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor, classes: tuple[str, ...] = (), top: int = 5) -> list[list[Guess]]:
    """The likeliest classes of each image of a batch `[N,3,H,W]`, best first.

    Args:
        model: a network, run in eval mode.
        x: normalised images.
        classes: names of the outputs; where there are none, their numbers.
        top: how many; at most as many as there are classes.

    Raises:
        ValueError: `top` is not positive.
    """
    if top < 1:
        raise ValueError(f"top must be positive, got {top}")
    p = model.eval()(_channels_last(x)).softmax(1)
    found = p.topk(min(top, p.shape[1]))
    return [
        [Guess(label, classes[label] if classes else str(label), q) for label, q in zip(labels, values, strict=True)]
        for labels, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
