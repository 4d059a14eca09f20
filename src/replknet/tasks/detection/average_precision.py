"""COCO's average precision of boxes and masks, by faster_coco_eval, whose results equal those of pycocotools.

We do not use torchmetrics' metric: it cannot gather its lists from processes with different numbers of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle
from torch import Tensor, distributed

# smallest probability of a pixel that belongs to the object
_MASK = 0.5


@dataclass(frozen=True)
class Average:
    """COCO's scores of a data set, from 0 to 1; None if the data has no such objects.

    Args:
        map: average precision, averaged over the ten IoU thresholds 0.5, 0.55, ..., 0.95 and over the classes.
        map50: average precision at an IoU of 0.5.
        map75: average precision at an IoU of 0.75.
        map_small: average precision for objects below 32x32 pixels.
        map_medium: average precision for objects from 32x32 to 96x96 pixels.
        map_large: average precision for objects above 96x96 pixels.
        mar100: recall with at most 100 detections an image, averaged over the ten thresholds and the classes.
        ap: average precision of each class.
    """

    map: float | None
    map50: float | None
    map75: float | None
    map_small: float | None
    map_medium: float | None
    map_large: float | None
    mar100: float | None
    ap: list[float | None]


@dataclass(frozen=True)
class DetectionScores:
    """How well a network finds the objects of a data set.

    Args:
        images: number of images that were scored.
        boxes: scores by the IoU of boxes.
        masks: scores by the IoU of masks; None if masks were not scored.
    """

    images: int
    boxes: Average
    masks: Average | None


@dataclass(frozen=True)
class _Image:
    """Objects and predictions of an image, as plain numbers and codes that can be sent to other processes."""

    objects: list[dict[str, Any]]
    found: list[dict[str, Any]]


class AveragePrecision:
    """Gathers predictions and targets over all processes, and scores them.

    Args:
        classes: number of classes.
        masks: whether to score masks, too.
    """

    def __init__(self, classes: int, masks: bool = False) -> None:
        self.classes, self.masks = classes, masks
        self._images: dict[int, _Image] = {}

    def reset(self) -> None:
        """Forget all images."""
        self._images = {}

    def update(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """Add images. An image that is added twice, here or in another process, counts once.

        Args:
            predictions: for each image `boxes` `[n,4]` (x1, y1, x2, y2) in the pixels of the targets, `scores` `[n]`,
                `labels` `[n]` from 0, and `masks` `[n,H,W]`, probabilities, if masks are scored.
            targets: for each image `image_id` `[]`, `boxes` `[m,4]`, `labels`, `crowd`, `area` `[m]`, and `masks`
                `[m,H,W]`, 0 or 1, if masks are scored.

        Raises:
            ValueError: the numbers of images differ, the entries of an image differ in length, or masks are missing.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"each image needs a prediction and targets, got {len(predictions)} and {len(targets)}")
        for prediction, target in zip(predictions, targets, strict=True):
            objects = self._records(target, ("labels", "crowd", "area"), "targets")
            for one, crowd, area in zip(objects, target["crowd"].tolist(), target["area"].tolist(), strict=True):
                one |= {"iscrowd": int(crowd), "area": area}
            found = self._records(prediction, ("labels", "scores"), "a prediction")
            for one, score in zip(found, prediction["scores"].tolist(), strict=True):
                one["score"] = score
            self._images[int(target["image_id"])] = _Image(objects, found)

    def _records(self, objects: dict[str, Tensor], keys: Sequence[str], what: str) -> list[dict[str, Any]]:
        keys = ["boxes", *keys, *(["masks"] if self.masks else [])]
        lengths = {key: len(objects[key]) if key in objects else None for key in keys}
        if None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"{what} must have {', '.join(keys)}, all of one length, got {lengths}")
        segmentations = _encoded(objects["masks"]) if self.masks else [None] * len(objects["boxes"])
        return [
            {"category_id": label, "bbox": box, "segmentation": segmentation}
            for label, box, segmentation in zip(
                objects["labels"].tolist(), _xywh(objects["boxes"]), segmentations, strict=True
            )
        ]

    def compute(self) -> DetectionScores:
        """The scores of all images of all processes; every process gets them.

        Raises:
            ValueError: there is no image.
        """
        images = self._images
        if distributed.is_available() and distributed.is_initialized():
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, images)
            images = {id: image for part in parts for id, image in part.items()}
        if not images:
            raise ValueError("no images to score")
        # equal scores are ranked in the order of the images, so the order must not depend on the processes
        images = dict(sorted(images.items()))
        return DetectionScores(
            images=len(images),
            boxes=_average(images, self.classes, "bbox"),
            masks=_average(images, self.classes, "segm") if self.masks else None,
        )


def _average(images: dict[int, _Image], classes: int, kind: Literal["bbox", "segm"]) -> Average:
    objects = _coco({id: image.objects for id, image in images.items()}, classes)
    found = _coco({id: image.found for id, image in images.items()}, classes)
    for one in found.dataset["annotations"]:
        # size of a prediction: its box or its mask, whichever is compared; objects have an annotated area
        one["area"] = one["bbox"][2] * one["bbox"][3] if kind == "bbox" else int(rle.area(one["segmentation"]))
    evaluation = COCOeval_faster(objects, found, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    # axes: IoU thresholds, recalls, classes, areas (all, small, medium, large), most detections (1, 10, 100);
    # recall lacks the axis of recalls
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    recall = np.asarray(evaluation.eval["recall"])[..., -1]
    return Average(
        map=_mean(precision[..., 0]),
        map50=_mean(precision[0, ..., 0]),
        map75=_mean(precision[5, ..., 0]),
        map_small=_mean(precision[..., 1]),
        map_medium=_mean(precision[..., 2]),
        map_large=_mean(precision[..., 3]),
        mar100=_mean(recall[..., 0]),
        ap=[_mean(precision[:, :, label, 0]) for label in range(classes)],
    )


def _coco(records: dict[int, list[dict[str, Any]]], classes: int) -> Any:
    """The records in the form of the evaluation. Ids start at 1, since a match with id 0 counts as no match."""
    annotations = [{**one, "image_id": id} for id, some in records.items() for one in some]
    for i, one in enumerate(annotations, 1):
        one["id"] = i
        one.setdefault("iscrowd", 0)
    sizes = {"height": 0, "width": 0}  # only polygons need them
    return COCO(
        {
            "images": [{"id": id, **sizes} for id in records],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(classes)],
        }
    )


def _mean(values: Any) -> float | None:
    # -1 marks entries without objects
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def _xywh(boxes: Tensor) -> list[list[float]]:
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


def _encoded(masks: Tensor) -> list[dict[str, Any]]:
    """Masks `[n,H,W]` in COCO's compressed code; pixels of 0.5 and above are inside."""
    pixels = (masks >= _MASK).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return [
        {"size": list(one["size"]), "counts": one["counts"].decode()} for one in rle.encode(np.asfortranarray(pixels))
    ]


def as_coco_results(
    predictions: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Predictions in the form of COCO's result files, ready for JSON.

    Args:
        predictions: for each image `boxes` `[n,4]` (x1, y1, x2, y2) in its own pixels, `scores`, `labels` `[n]`, and
            optionally `masks` `[n,H,W]`, probabilities.
        image_ids: id of each image.
        category_ids: id of each label.

    Returns:
        One dict a detection: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels, rounded to hundredths),
        `score`, and `segmentation` if there are masks.

    Raises:
        ValueError: the numbers of predictions and ids differ.
    """
    if len(predictions) != len(image_ids):
        raise ValueError(f"each prediction needs an image's id, got {len(predictions)} and {len(image_ids)}")
    results: list[dict[str, Any]] = []
    for prediction, image_id in zip(predictions, image_ids, strict=True):
        segmentations = _encoded(prediction["masks"]) if "masks" in prediction else None
        for i, (box, score, label) in enumerate(
            zip(_xywh(prediction["boxes"]), prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True)
        ):
            result = {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]),
                "bbox": [round(value, 2) for value in box],
                "score": round(score, 6),
            }
            results.append(result if segmentations is None else {**result, "segmentation": segmentations[i]})
    return results
