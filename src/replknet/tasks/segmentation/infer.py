"""Semantic segmentation: prediction whole and by windows, scores, and training."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from monai.inferers.utils import sliding_window_inference
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from replknet.data.images import pixels
from replknet.data.mask_transforms import fitted
from replknet.data.masks import IGNORE
from replknet.tasks.segmentation.files import SegmentationDescription
from replknet.tasks.segmentation.heads import UperNet
from replknet.train.optimisers import by_depth
from replknet.train.sharding import gather, shard

# the loss of the auxiliary head counts so much beside the other's
_AUXILIARY_WEIGHT = 0.4


# ---- prediction


@dataclass(frozen=True)
class Inference:
    """How a network is run on an image.

    Args:
        window: side of the windows, pixels; None for the whole image at once. An image that is smaller is one window.
        stride: from one window to the next, pixels; the last one of a row ends at the image's edge.
        ratios: sizes of the image relative to its own, or to `scale`, whose probabilities are averaged.
        flip: average with the mirrored image, too.
        scale: longer and shorter side, pixels, into which an image is fitted; None for its own size.

    Raises:
        ValueError: a window without a stride, or values that are not positive.
    """

    window: int | None = None
    stride: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    scale: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (self.stride and 0 < self.stride <= self.window):
            raise ValueError(f"stride must be from 1 to the window's {self.window}, got {self.stride}")
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios must be positive, got {self.ratios}")

    @torch.inference_mode()
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        """Class of each pixel: `[N,*size]`, uint8.

        Args:
            model: images to logits of the same size.
            x: `[N,3,H,W]`, normalised.
            size: (height, width) of the result.
        """
        if len(self.ratios) == 1 and not self.flip:
            return self._resized(model, self._scaled(x, self.ratios[0]), size).argmax(1).to(torch.uint8)
        total: Tensor | float = 0.0
        for ratio in self.ratios:
            scaled = self._scaled(x, ratio)
            total = total + self._resized(model, scaled, size).softmax(1)
            if self.flip:
                total = total + self._resized(model, scaled.flip(-1), size).flip(-1).softmax(1)
        assert isinstance(total, Tensor)
        return total.argmax(1).to(torch.uint8)

    def _scaled(self, x: Tensor, ratio: float) -> Tensor:
        height, width = x.shape[-2:]
        long, short = self.scale or (max(height, width), min(height, width))
        size = fitted(height, width, long * ratio, short * ratio)
        if size == (height, width):
            return x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def _resized(self, model: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        logits = self.logits(model, x).float()
        if tuple(logits.shape[-2:]) == size:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=getattr(model, "align_corners", False))

    def logits(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits of the whole image, the mean of those of its windows: `[N,classes,H,W]`."""
        if self.window is None or self.stride is None:
            return model(x)
        sides = [min(self.window, side) for side in x.shape[-2:]]
        # monai takes the whole part of side * (1 - overlap) for its step; half a pixel more leaves no doubt
        overlap = [max(0.0, 1 - (self.stride + 0.5) / side) for side in sides]
        return sliding_window_inference(x, sides, 1, model, overlap=overlap)  # type: ignore[return-value]  # a tensor


def inference_of(
    description: SegmentationDescription,
    window: int | None = None,
    stride: int | None = None,
    ratios: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Inference:
    """The inference that a network was trained for, or another window."""
    if window is None:
        window, stride = description.window, stride or description.stride
    # two thirds, as the paper has it
    stride = stride or (None if window is None else 2 * window // 3)
    return Inference(window, stride, ratios, flip, description.scale)


def predict(model: nn.Module, image: Image.Image, description: SegmentationDescription, inference: Inference) -> Tensor:
    """The class of each pixel of an image in RGB: `[H,W]`, uint8."""
    x = description.normalize(pixels(image))
    return inference(model.eval(), _channels_last(x[None]), (image.height, image.width))[0]


# ---- scores


@dataclass(frozen=True)
class SegmentationScores:
    """How well a network segments a data set, as mmsegmentation counts it; shares are from 0 to 1."""

    images: int
    miou: float  # mean of the classes that occur in masks or predictions
    accuracy: float  # share of the labelled pixels that are right
    mean_accuracy: float  # mean of the classes that occur in masks
    iou: list[float | None]  # per class; None where it occurs nowhere
    class_accuracy: list[float | None]  # per class; None where it occurs in no mask
    confusion: list[list[int]]  # pixels of the row's class that were taken for the column's


def scores(confusion: Tensor, images: int) -> SegmentationScores:
    """Scores of a data set from its confusion matrix `[classes,classes]`, int64, rows for the masks."""
    right, in_masks, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = in_masks + predicted - right
    iou = [r / u if u else None for r, u in zip(right.tolist(), union.tolist(), strict=True)]
    accuracy = [r / n if n else None for r, n in zip(right.tolist(), in_masks.tolist(), strict=True)]
    return SegmentationScores(
        images=images,
        miou=_mean(iou),
        accuracy=right.sum().item() / max(1, int(confusion.sum())),
        mean_accuracy=_mean(accuracy),
        iou=iou,
        class_accuracy=accuracy,
        confusion=confusion.tolist(),
    )


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else math.nan


def confusion_of(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Confusion matrix `[classes,classes]`, int64, of predictions and masks `[N,H,W]`; IGNORE counts nowhere."""
    labelled = mask != IGNORE
    return multiclass_confusion_matrix(predicted[labelled].long(), mask[labelled].long(), classes)


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int, inference: Inference
) -> SegmentationScores:
    """Score a network, in eval mode, on batches of images `[N,3,H,W]` and masks `[N,H',W']`; memory does not grow.

    Raises:
        ValueError: there is no image.
    """
    model = model.eval()
    total, images = torch.zeros(classes, classes, dtype=torch.int64), 0
    for x, mask in batches:
        predicted = inference(model, _channels_last(x), (mask.shape[-2], mask.shape[-1]))
        total += confusion_of(predicted, mask, classes).cpu()
        images += len(x)
    if images == 0:
        raise ValueError("no images to evaluate")
    return scores(total, images)


# ---- training


class Segmentation(pl.LightningModule):
    """A segmentation network in training: cross entropy of both heads, AdamW, a learning rate that falls linearly.

    Args:
        model: with an auxiliary head, or without.
        optimizer: timm's name of it.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up.
        weight_decay: decay of weights; biases and norms are exempt.
        backbone_lr: learning rate of the backbone relative to the heads'.
        inference: how validation runs the network.
        compile: train through torch.compile.
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
        # in a tuple, since as a child of its own it would double the weights' names
        self._trained = (torch.compile(self.model) if compile else self.model,)
        self.optimizer, self.lr, self.warmup_steps = optimizer, lr, warmup_steps
        self.weight_decay, self.backbone_lr, self.inference = weight_decay, backbone_lr, inference
        self.last_loss = torch.zeros(())

    @property
    def weights(self) -> nn.Module:
        """The network to be scored and kept."""
        return self.model

    def configure_model(self) -> None:
        # Lightning calls it under each strategy; a mesh is there if the weights are to be divided
        shard(self.model, getattr(self, "_device_mesh", None))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, mask = batch
        loss = training_loss(self._trained[0], _channels_last(x), mask, self.model.auxiliary_head is not None)
        self.log("loss", loss, prog_bar=True)
        self.last_loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        gather(self.model, True)
        classes = self.model.num_classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, mask = batch
        predicted = self.inference(self.model.eval(), _channels_last(x), (mask.shape[-2], mask.shape[-1]))
        self._confusion += confusion_of(predicted, mask, self.model.num_classes)

    def on_validation_epoch_end(self) -> None:
        gather(self.model, False)
        # each image is with one process; float64 holds these counts exactly
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
    """Cross entropy of a UperNet, with that of its auxiliary head if it has one.

    Args:
        model: the network.
        x: normalised images `[N,3,H,W]`.
        mask: class of each pixel `[N,H,W]`, uint8, or IGNORE.
        auxiliary: whether there is such a head.
    """
    target = mask.long()
    if not auxiliary:
        return _loss(model(x), target)
    logits, others = model(x, auxiliary=True)
    return _loss(logits, target) + _AUXILIARY_WEIGHT * _loss(others, target)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy; as in mmsegmentation 0.x the mean is over all pixels, of which those without a label add 0."""
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum") / target.numel()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
