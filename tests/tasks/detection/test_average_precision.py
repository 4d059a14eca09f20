"""Average precision is what pycocotools counts on the same JSON, on one process or several."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replknet.data.coco import CocoImages
from replknet.tasks.detection.average_precision import AveragePrecision, as_coco_results

# the last but one occurs in no image, and the last in crowds alone
CATEGORIES = (2, 5, 6, 44, 90)
HEIGHT, WIDTH = 200, 240


def diamond(box):
    x1, y1, x2, y2 = box
    return [x1, (y1 + y2) / 2, (x1 + x2) / 2, y1, x2, (y1 + y2) / 2, (x1 + x2) / 2, y2]


def pixels(box):
    """A mask of probabilities, 0.9 inside the box's diamond: `[H,W]`."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    x1, y1, x2, y2 = box
    away = (2 * x - x1 - x2).abs() / (x2 - x1) + (2 * y - y1 - y2).abs() / (y2 - y1)
    return torch.where(away <= 1, 0.9, 0.1)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A data set with all that COCO counts apart, and predictions near its objects and far from them."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    (folder / "val").mkdir()
    random = np.random.default_rng(3)
    content = {"images": [], "annotations": [], "categories": [{"id": id, "name": str(id)} for id in CATEGORIES]}
    predictions = []
    for number in range(14):
        # ids are not in the order of the list
        id = (number * 5) % 14 + 100
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"val/{id}.png")
        content["images"].append({"id": id, "file_name": f"{id}.png", "width": WIDTH, "height": HEIGHT})
        found = []
        # one image has neither objects nor predictions, one no objects, one no predictions
        for _ in range(0 if number in (3, 4) else int(random.integers(2, 9))):
            side = random.choice([12, 25, 60, 130], 2) * random.uniform(0.8, 1.2, 2)
            corner = random.uniform(0, [WIDTH - 20, HEIGHT - 20])
            box = [*corner, *np.minimum(corner + side, [WIDTH, HEIGHT])]
            crowd = random.random() < 0.2
            label = 4 if crowd and random.random() < 0.5 else int(random.integers(3))
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": id, "category_id": CATEGORIES[label],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "iscrowd": int(crowd),
                # not that of the polygon, so that it is seen which one counts
                "area": 0.7 * (box[2] - box[0]) * (box[3] - box[1]), "segmentation": [diamond(box)],
            })  # fmt: skip
            for _ in range(int(random.integers(3))):
                moved = np.array(box) + random.normal(0, 0.05, 4) * np.tile(side, 2)
                found.append((moved, label if random.random() < 0.8 else int(random.integers(5))))
        for _ in range(0 if number in (3, 5) else int(random.integers(4))):
            corner = random.uniform(0, 120, 2)
            found.append((np.concatenate([corner, corner + random.uniform(10, 70, 2)]), int(random.integers(5))))
        if number == 5:
            found = []
        predictions.append({
            "boxes": torch.tensor(np.array([box for box, _ in found])).float().reshape(-1, 4),
            "labels": torch.tensor([label for _, label in found], dtype=torch.int64),
            # a tenth apart: many are equal
            "scores": torch.tensor(random.integers(1, 10, len(found)) / 10).float(),
            "masks": torch.stack([pixels(box) for box, _ in found]) if found else torch.empty(0, HEIGHT, WIDTH),
        })  # fmt: skip
    (folder / "annotations/instances_val.json").write_text(json.dumps(content))
    return folder, predictions


def targets_of(images):
    return [
        {**targets, "image_id": torch.tensor(id)} for (_, targets), id in zip(images, images.image_ids, strict=True)
    ]


def cocos(folder, results, kind):
    truth = COCO(folder / "annotations/instances_val.json")
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    classes = evaluation.eval["precision"][:, :, :, 0, -1]
    return evaluation.stats, [classes[:, :, k][classes[:, :, k] > -1] for k in range(len(CATEGORIES))]


def same(average, stats, classes):
    ours = (average.map, average.map50, average.map75, average.map_small, average.map_medium, average.map_large)
    for one, expected in zip((*ours, average.mar100), (*stats[:6], stats[8]), strict=True):
        assert one == (None if expected == -1 else pytest.approx(expected, abs=1e-6))
    for one, expected in zip(average.ap, classes, strict=True):
        assert one == (pytest.approx(expected.mean(), abs=1e-6) if len(expected) else None)


def test_boxes_and_masks_score_as_in_pycocotools(crowded):
    folder, predictions = crowded
    images = CocoImages(folder, "val", masks=True)
    boxes, masks = [], []
    for id, prediction in zip(images.image_ids, predictions, strict=True):
        for box, score, label, mask in zip(
            *(prediction[k] for k in ("boxes", "scores", "labels", "masks")), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            one = {"image_id": id, "category_id": CATEGORIES[label], "score": score.item()}
            boxes.append({**one, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            masks.append({**one, "segmentation": rle.encode(np.asfortranarray((mask >= 0.5).byte().numpy()))})
    metric = AveragePrecision(len(CATEGORIES), masks=True)
    targets = targets_of(images)
    # in another order than the JSON's, and one of them twice
    metric.update(predictions[7:], targets[7:])
    metric.update(predictions[:8], targets[:8])
    scores = metric.compute()
    assert scores.images == 14
    same(scores.boxes, *cocos(folder, boxes, "bbox"))
    same(scores.masks, *cocos(folder, masks, "segm"))
    assert 0.2 < scores.boxes.map < 0.9
    assert scores.boxes != scores.masks
    assert [ap is None for ap in scores.boxes.ap] == [False, False, False, True, True]
    # boxes alone need no masks
    metric = AveragePrecision(len(CATEGORIES))
    metric.update(
        *([{k: v for k, v in one.items() if k != "masks"} for one in some] for some in (predictions, targets))
    )
    assert metric.compute().boxes == scores.boxes
    assert metric.compute().masks is None


def test_right_and_missed_and_invented():
    def target(id, boxes, crowd=False):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        n = len(boxes)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return {
            "image_id": torch.tensor(id), "boxes": boxes, "labels": torch.zeros(n, dtype=torch.int64),
            "crowd": torch.full((n,), crowd), "area": area, "scores": torch.linspace(1, 0.5, n),
        }  # fmt: skip

    def scored(prediction, *targets):
        metric = AveragePrecision(2)
        metric.update([prediction, *[target(0, [])] * (len(targets) - 1)], targets)
        return metric.compute().boxes

    two = target(1, [[0, 0, 10, 10], [20, 20, 120, 120]])
    right = scored(two, two)
    assert (right.map, right.map_small, right.map_medium, right.map_large) == (1, 1, None, 1)
    assert (right.mar100, right.ap) == (1, [1, None])
    # one of two is found: all precision up to half the recall, which are 51 of 101 places
    assert scored(target(1, [[0, 0, 10, 10]]), two).map == pytest.approx(51 / 101)
    # an overlap of 0.8 counts for seven of the ten
    assert scored(target(1, [[0, 0, 10, 8]]), target(1, [[0, 0, 10, 10]])).map == pytest.approx(0.7)
    # nothing is found: 0; there is nothing to find: None, in crowds, too
    assert scored(target(1, []), two).map == 0
    assert scored(two, target(1, [])).map is None
    assert scored(target(1, []), target(1, [])).map is None
    assert scored(two, target(1, [[0, 0, 50, 50]], crowd=True)).map is None


def test_what_does_not_fit_is_refused():
    metric = AveragePrecision(2, masks=True)
    with pytest.raises(ValueError, match="no images to score"):
        metric.compute()
    with pytest.raises(ValueError, match="each image needs a prediction and targets, got 1 and 0"):
        metric.update([{}], [])
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0).long(), "scores": torch.empty(0)}
    target = {**empty, "crowd": torch.empty(0), "area": torch.empty(1), "masks": torch.empty(0, 4, 4)}
    with pytest.raises(
        ValueError, match=r"targets must have boxes, labels, crowd, area, masks, all of one .*'area': 1"
    ):
        metric.update([empty], [target])
    target |= {"area": torch.empty(0), "image_id": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"a prediction must have boxes, labels, scores, masks, .*'masks': None"):
        metric.update([empty], [target])
    metric.update([{**empty, "masks": torch.empty(0, 4, 4)}], [target])
    assert metric.compute().images == 1
    metric.reset()
    with pytest.raises(ValueError, match="no images to score"):
        metric.compute()
    with pytest.raises(ValueError, match="each prediction needs an image's id, got 1 and 2"):
        as_coco_results([empty], [1, 2], [1])


def test_results_are_what_coco_reads(crowded, tmp_path):
    folder, predictions = crowded
    images = CocoImages(folder, "val", masks=True)
    results = as_coco_results(predictions, images.image_ids, images.category_ids)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    assert len(results) == sum(len(prediction["scores"]) for prediction in predictions)
    first = next(prediction for prediction in predictions if len(prediction["scores"]))
    x1, y1, x2, y2 = first["boxes"][0].tolist()
    assert results[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.0051)
    assert (results[0]["image_id"], results[0]["category_id"]) == (100, CATEGORIES[first["labels"][0]])
    metric = AveragePrecision(len(CATEGORIES), masks=True)
    metric.update(predictions, targets_of(images))
    masks = [{key: value for key, value in one.items() if key != "bbox"} for one in json.loads(file.read_text())]
    # masks are written exactly, boxes to a hundredth of a pixel
    same(metric.compute().masks, *cocos(folder, masks, "segm"))
    stats, _ = cocos(folder, [{k: v for k, v in one.items() if k != "segmentation"} for one in results], "bbox")
    assert metric.compute().boxes.map == pytest.approx(stats[0], abs=0.01)
    assert (
        "segmentation"
        not in as_coco_results([{k: first[k] for k in ("boxes", "scores", "labels")}], [7], CATEGORIES)[0]
    )


DISTRIBUTED = """
import sys
from dataclasses import asdict
from pathlib import Path
import torch
from replknet.tasks.detection.average_precision import AveragePrecision

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
predictions, targets = torch.load(folder / "all.pt")
metric = AveragePrecision(5, masks=True)
# every third image is with the second process, and one with both
mine = [i for i in range(len(targets)) if (i % 3 == 2) == bool(rank) or i == 6]
metric.update([predictions[i] for i in mine], [targets[i] for i in mine])
torch.save(asdict(metric.compute()), folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.full
def test_two_processes_count_each_image_once(crowded, tmp_path):
    folder, predictions = crowded
    targets = targets_of(CocoImages(folder, "val", masks=True))
    torch.save((predictions, targets), tmp_path / "all.pt")
    program = tmp_path / "program.py"
    program.write_text(DISTRIBUTED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path), str(rank)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    metric = AveragePrecision(len(CATEGORIES), masks=True)
    metric.update(predictions, targets)
    one = metric.compute()
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt")
        assert two["images"] == one.images == 14
        assert two["boxes"] == one.boxes.__dict__
        assert two["masks"] == one.masks.__dict__
