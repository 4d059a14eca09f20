"""Object detection and instance segmentation: prediction, scores, and training."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from replknet.data.box_transforms import ForEvaluation, Targets, rescaled
from replknet.data.images import pixels
from replknet.tasks.detection.average_precision import AveragePrecision, DetectionScores
from replknet.tasks.detection.files import DetectionDescription
from replknet.train.optimisers import by_depth

# ---- prediction


@torch.inference_mode()
def predict(model: nn.Module, image: Image.Image, description: DetectionDescription) -> Targets:
    """The objects in an image in RGB, best first.

    Args:
        model: a detector; it is put into eval mode.
        image: of any size; it is fitted into the description's scale.
        description: of the detector.

    Returns:
        `boxes` `[n,4]` (x1, y1, x2, y2) in pixels of the image, `labels` `[n]` from 0, `scores` `[n]`, and `masks`
        `[n,H,W]`, probabilities, where the detector finds them.
    """
    x, _ = ForEvaluation(description.scale, description.normalize)(pixels(image), {})
    (found,) = model.eval()([x])
    return rescaled(found, (x.shape[1], x.shape[2]), (image.height, image.width))


# ---- scores


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[Targets]]],
    classes: int,
    masks: bool = False,
) -> DetectionScores:
    """Score a detector, in eval mode, as COCO does.

    Args:
        model: the detector.
        batches: images and targets as a `BoxSet` with `ForEvaluation` gives them, listed.
        classes: number of them.
        masks: whether masks are scored beside boxes.

    Raises:
        ValueError: there is no image.
    """
    model.eval()
    precision = AveragePrecision(classes, masks)
    for images, targets in batches:
        precision.update(_found(model, images, targets), targets)
    return precision.compute()


def _found(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Targets]) -> list[Targets]:
    """What is in each image, in the pixels of its file."""
    return [
        rescaled(found, (image.shape[1], image.shape[2]), tuple(target["size"].tolist()))
        for found, image, target in zip(model(images), images, targets, strict=True)
    ]


# ---- training


class Detection(pl.LightningModule):
    """A detector in training: its losses added up, AdamW, a learning rate that falls in steps.

    Args:
        model: a detector.
        classes: number of them.
        masks: whether masks are scored.
        optimizer: timm's name of it.
        lr: peak learning rate.
        warmup: "linear" from `warmup_start` of the learning rate, or "constant" there.
        warmup_start: from 0 to 1.
        warmup_steps: its length.
        drops: shares of the training after which the learning rate falls to a tenth, from 0 to 1.
        weight_decay: decay of weights; biases and norms are exempt.
        backbone_lr: learning rate of the backbone relative to the heads'.
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
        """The network to be scored and kept."""
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
        self.precision.update(_found(self.model.eval(), images, targets), targets)

    def on_validation_epoch_end(self) -> None:
        found = self.precision.compute()
        # where there is nothing to be found, nothing was
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
