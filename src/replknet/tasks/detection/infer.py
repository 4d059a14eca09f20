"""Object detection and instance segmentation: prediction and scores."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from replknet.data.batches import batches
from replknet.data.box_transforms import BoxSet, ForEvaluation, Targets, listed, rescaled
from replknet.data.coco import CocoImages
from replknet.data.images import pixels
from replknet.tasks.detection.average_precision import AveragePrecision, DetectionScores, as_coco_results
from replknet.tasks.detection.batches import batched as one_batch
from replknet.tasks.detection.files import DetectionDescription
from replknet.tasks.detection.pyramid import Pyramid
from replknet.tasks.detection.settings import EvaluationSettings, PredictionSettings
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


@torch.inference_mode()
def predict(model: nn.Module, image: Image.Image, description: DetectionDescription) -> Targets:
    """The objects in an image in RGB, best first.

    Args:
        model: a detector; it is put into eval mode.
        image: an image of any size; it is fitted into the description's scale.
        description: description of the detector.

    Returns:
        `boxes` `[n,4]` (x1, y1, x2, y2) in pixels of the image, `labels` `[n]` from 0, `scores` `[n]`, and `masks`
        `[n,H,W]`, probabilities, if the detector has masks.
    """
    x, _ = ForEvaluation(description.scale, description.normalize)(pixels(image), {})
    (found,) = model.eval()([x])
    return rescaled(found, (x.shape[1], x.shape[2]), (image.height, image.width))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batched: Iterable[tuple[list[Tensor], list[Targets]]],
    classes: int,
    masks: bool = False,
) -> DetectionScores:
    """Score a detector, in eval mode, with COCO's metrics.

    Args:
        model: the detector.
        batched: batches of images and targets from a `BoxSet` with `ForEvaluation`, collated by `listed`.
        classes: number of classes.
        masks: whether to score masks, too.

    Returns:
        The scores over all images.

    Raises:
        ValueError: there is no image.
    """
    model.eval()
    precision = AveragePrecision(classes, masks)
    for images, targets in batched:
        precision.update(found_in(model, images, targets), targets)
    return precision.compute()


def found_in(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Targets]) -> list[Targets]:
    """The predictions for each image, in the pixels of its file."""
    return [
        rescaled(found, (image.shape[1], image.shape[2]), tuple(target["size"].tolist()))
        for found, image, target in zip(model(images), images, targets, strict=True)
    ]


def _predictor(network: Network, settings: PredictionSettings) -> Callable[[Image.Image], Prediction]:
    d = network.description

    def found(image: Image.Image) -> Prediction:
        everything = predict(network.model, image, d)
        keep = everything["scores"] >= settings.min_score
        objects = {key: value[keep] for key, value in everything.items()}
        labels, scores = objects["labels"].tolist(), objects["scores"].tolist()
        # COCO's form, with the name of the class instead of its id, and without the id of the image
        told = as_coco_results([objects], [0], range(len(d.classes)))
        for one in told:
            one["class"] = d.classes[one.pop("category_id")]
            del one["image_id"]

        def draw() -> Any:
            from replknet.analysis import plots  # matplotlib is optional

            masks = objects["masks"] >= 0.5 if d.masks else None
            return plots.boxes(image, objects["boxes"], labels, scores, d.classes, masks)

        counts = Counter(d.classes[label] for label in labels)
        text = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        return Prediction({"objects": told}, text, draw)

    return found


def _evaluate(network: Network, data: Path | None, settings: EvaluationSettings, shown: Shown) -> Scored:
    data, d = named_data(data, "the images and annotations"), network.description
    images = CocoImages(data, settings.split, masks=d.masks, malformed=settings.malformed)
    if images.problems:
        print(f"left out: {'; '.join(map(str, images.problems))}", file=sys.stderr)
    check_classes(d.classes, images.classes, data)
    loader = batches(BoxSet(images, ForEvaluation(d.scale, d.normalize)), 1, collate=listed)
    found = evaluate(network.model, shown(loader), len(d.classes), d.masks)
    lines = [f"{found.images} images"]
    for what, average in (("boxes", found.boxes), ("masks", found.masks)):
        if average is None:
            continue
        lines.append(
            f"{what}  AP {percent(average.map)}  AP50 {percent(average.map50)}  AP75 {percent(average.map75)}  "
            f"small {percent(average.map_small)}  medium {percent(average.map_medium)}  large "
            f"{percent(average.map_large)}  recall {percent(average.mar100)}"
        )
        lines += [f"  {label:<20} {percent(ap):>7}" for label, ap in zip(d.classes, average.ap, strict=True)]
    return Scored(asdict(found), tuple(lines))


def _comparison(network: Network) -> Comparison:
    d = network.description
    fit = ForEvaluation(d.scale, d.normalize)
    return Comparison(
        random=random_images(3, 256),
        image=lambda image: one_batch([fit(pixels(image), {})[0]])[0],
        output=_levels,
    )


def _levels(model: nn.Module, x: Tensor) -> Tensor:
    """All levels of the pyramid. Boxes are not compared: a tiny difference can change which boxes are chosen."""
    (pyramid,) = (module for module in model.modules() if isinstance(module, Pyramid))
    return torch.cat([level.flatten() for level in pyramid(x)])


INFER = Infer(_predictor, _evaluate, _comparison)
