"""Semantic segmentation: prediction on whole images or by windows, and scores."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from replknet.data.batches import batches
from replknet.data.images import pixels
from replknet.data.mask_transforms import ForEvaluation, fitted
from replknet.data.masks import IGNORE, MaskSet, Pairs
from replknet.tasks.segmentation.files import SegmentationDescription
from replknet.tasks.segmentation.settings import EvaluationSettings, PredictionSettings
from replknet.tasks.task import (
    Comparison,
    Infer,
    Network,
    Prediction,
    Scored,
    Shown,
    check_classes,
    named_data,
    percent,
    random_images,
)


@dataclass(frozen=True)
class Inference:
    """How a network segments an image.

    Args:
        window: side of the sliding windows, pixels; None: the whole image at once. A smaller image is one window.
        stride: distance from one window to the next, pixels; the last window of a row ends at the image's edge.
        ratios: factors on the image's size, or on `scale`. The probabilities of several factors are averaged.
        flip: whether to average with the mirrored image, too.
        scale: longer and shorter side that an image is fitted into, pixels; None: the image's own size.
        align_corners: whether logits are resized to the result with aligned corners, as the network does inside.

    Raises:
        ValueError: a window has no stride, or a value is not positive.
    """

    window: int | None = None
    stride: int | None = None
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    scale: tuple[int, int] | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and not (self.stride and 0 < self.stride <= self.window):
            raise ValueError(f"stride must be from 1 to the window's {self.window}, got {self.stride}")
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios must be positive, got {self.ratios}")

    @torch.inference_mode()
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        """The class of each pixel: `[N,*size]`, uint8.

        Args:
            model: maps images to logits of their size.
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
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)

    def logits(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits of the whole image `[N,classes,H,W]`; where windows overlap, a mean over the windows."""
        if self.window is None or self.stride is None:
            return model(x)
        sides = [min(self.window, side) for side in x.shape[-2:]]
        from monai.inferers.utils import sliding_window_inference  # optional, and slow to import

        # monai's step is side * (1 - overlap), rounded down; half a pixel more keeps it from falling below the stride
        overlap = [max(0.0, 1 - (self.stride + 0.5) / side) for side in sides]
        return sliding_window_inference(x, sides, 1, model, overlap=overlap)  # type: ignore[return-value]  # a tensor


def inference_of(
    description: SegmentationDescription,
    window: int | None = None,
    stride: int | None = None,
    ratios: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Inference:
    """The inference with the window of a network's description, or with another one.

    Args:
        description: description of the network.
        window: side of the windows, pixels; None: the description's.
        stride: distance from one window to the next, pixels; None: the description's, or two thirds of the window.
        ratios: factors on the image's size; the probabilities of several factors are averaged.
        flip: whether to average with the mirrored image, too.

    Returns:
        A callable that maps a network, images and a size to the class of each pixel.
    """
    if window is None:
        window, stride = description.window, stride or description.stride
    # the paper's stride is two thirds of the window
    stride = stride or (None if window is None else 2 * window // 3)
    return Inference(window, stride, ratios, flip, description.scale, description.align_corners)


def predict(model: nn.Module, image: Image.Image, description: SegmentationDescription, inference: Inference) -> Tensor:
    """The class of each pixel of an image in RGB.

    Args:
        model: maps images to logits; it is put into eval mode.
        image: an image of any size.
        description: description of the network.
        inference: how the network segments the image.

    Returns:
        `[H,W]`, uint8.
    """
    x = description.normalize(pixels(image))
    x = x[None].contiguous(memory_format=torch.channels_last)
    return inference(model.eval(), x, (image.height, image.width))[0]


@dataclass(frozen=True)
class SegmentationScores:
    """How well a network segments a data set, counted as in mmsegmentation; shares are from 0 to 1.

    Args:
        images: number of images.
        miou: mean IoU (intersection over union) of the classes that occur in masks or predictions.
        accuracy: share of the labelled pixels that are right.
        mean_accuracy: mean accuracy of the classes that occur in masks.
        iou: IoU of each class; None if it occurs in no mask and no prediction.
        class_accuracy: accuracy of each class; None if it occurs in no mask.
        confusion: numbers of pixels; the row is the class in the mask, the column the predicted one.
    """

    images: int
    miou: float
    accuracy: float
    mean_accuracy: float
    iou: list[float | None]
    class_accuracy: list[float | None]
    confusion: list[list[int]]


def scores(confusion: Tensor, images: int) -> SegmentationScores:
    """The scores of a confusion matrix `[classes,classes]`, int64; a row is a class in the masks."""
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
    """Confusion matrix `[classes,classes]`, int64, of predictions and masks `[N,H,W]`, without pixels of IGNORE."""
    labelled = mask != IGNORE
    places = mask[labelled].long() * classes + predicted[labelled].long()
    return torch.bincount(places, minlength=classes**2).view(classes, classes)


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int, inference: Inference
) -> SegmentationScores:
    """Score a network in eval mode. Memory does not grow with the number of batches.

    Args:
        model: maps images to logits.
        batches: images `[N,3,H,W]`, normalised, and masks `[N,H',W']`, uint8.
        classes: number of classes.
        inference: how the network segments an image.

    Returns:
        The scores over all images.

    Raises:
        ValueError: there is no image.
    """
    model = model.eval()
    total, images = torch.zeros(classes, classes, dtype=torch.int64), 0
    for x, mask in batches:
        predicted = inference(model, x.contiguous(memory_format=torch.channels_last), (mask.shape[-2], mask.shape[-1]))
        total += confusion_of(predicted, mask, classes).cpu()
        images += len(x)
    if images == 0:
        raise ValueError("no images to evaluate")
    return scores(total, images)


def _predictor(network: Network, settings: PredictionSettings) -> Callable[[Image.Image], Prediction]:
    d = network.description
    inference = inference_of(d, settings.window, settings.stride)

    def found(image: Image.Image) -> Prediction:
        labels = predict(network.model, image, d, inference)
        shares = torch.bincount(labels.flatten().long(), minlength=len(d.classes)) / labels.numel()
        named = {d.classes[i]: shares[i].item() for i in shares.argsort(descending=True).tolist() if shares[i] > 0}

        def draw() -> Any:
            from replknet.analysis import plots  # matplotlib is optional

            return plots.overlay(image, labels, d.colours.names, d.colours.palette)

        text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in named.items())
        return Prediction({"shares": named}, text, draw)

    return found


def _evaluate(network: Network, data: Path | None, settings: EvaluationSettings, shown: Shown) -> Scored:
    data, d = named_data(data, "the images and masks"), network.description
    inference = inference_of(d, settings.window, settings.stride, settings.ratios, settings.flip)
    pairs = Pairs(settings.dataset, data, settings.split)
    check_classes(d.classes, pairs.classes.names, data)
    loader = batches(MaskSet(pairs, ForEvaluation(d.normalize)), 1)
    found = evaluate(network.model, shown(loader), len(d.classes), inference)
    lines = [
        f"{found.images} images  mIoU {100 * found.miou:.2f} %  pixel accuracy {100 * found.accuracy:.2f} %  "
        f"mean class accuracy {100 * found.mean_accuracy:.2f} %",
        f"  {'class':<20} {'IoU':>7} {'accuracy':>9}",
    ]
    lines += [
        f"  {label:<20} {percent(iou):>7} {percent(accuracy):>9}"
        for label, iou, accuracy in zip(d.classes, found.iou, found.class_accuracy, strict=True)
    ]
    return Scored(asdict(found), tuple(lines))


def _comparison(network: Network) -> Comparison:
    return Comparison(
        random=random_images(3, 256),
        image=lambda image: network.description.normalize(pixels(image))[None],
        output=lambda model, x: model(x),
    )


INFER = Infer(_predictor, _evaluate, _comparison)
