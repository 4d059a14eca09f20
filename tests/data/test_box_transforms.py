"""Images, boxes and masks move together, in the sizes of the official configurations."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from replknet.data.box_transforms import (
    BoxSet,
    ForEvaluation,
    ForTraining,
    listed,
    rescaled,
)
from replknet.data.coco import CocoImages
from replknet.data.mask_transforms import Normalize
from replknet.data.sampling import Draw, Drawn
from replknet.tasks.detection.recipes import DETR_CROP_SCALES, DETR_SCALES

PLAIN = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def scene(boxes, height=60, width=80):
    """An image with a white rectangle for each box, in the channel of its number, and the targets."""
    image, masks = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(len(boxes), height, width).byte()
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        image[i, y1:y2, x1:x2], masks[i, y1:y2, x1:x2] = 255, 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    targets = {
        "boxes": boxes,
        "labels": torch.arange(len(boxes)),
        "crowd": torch.zeros(len(boxes), dtype=torch.bool),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "masks": masks,
    }
    return image, targets


def rectangle(pixels):
    """The box round the pixels of a mask."""
    y, x = pixels.nonzero().unbind(1)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


BOXES = [(5, 8, 30, 40), (33, 2, 70, 20), (40, 30, 79, 59)]


@pytest.mark.parametrize("crop_scales", [(), ((700, 400), (700, 500))])
def test_boxes_and_masks_follow_the_pixels(crop_scales):
    image, targets = scene(BOXES)
    transform = ForTraining(((200, 90), (110, 100)), PLAIN, crop_scales)
    drawn = set()
    for seed in range(12):
        torch.manual_seed(seed)
        x, y = transform(image, targets)
        drawn.add((tuple(x.shape), y["boxes"][0].tolist()[0]))
        assert y["masks"].shape == (len(y["boxes"]), *x.shape[1:])
        assert y["masks"].dtype == torch.uint8
        # a crop is enlarged or shrunk by a factor of at most two, and with it a pixel of the rectangle's edge
        for box, label, mask in zip(y["boxes"], y["labels"], y["masks"], strict=True):
            if mask.any():
                assert (rectangle(mask) - box).abs().max() <= 1
            if (x[label] > 0.5).any():
                assert (rectangle(x[label] > 0.5) - box).abs().max() <= 1.01
        area = (y["boxes"][:, 2:] - y["boxes"][:, :2]).prod(1)
        torch.testing.assert_close(y["area"], area)
    assert len(drawn) >= 4
    # what came is as it was
    assert torch.equal(targets["boxes"], torch.tensor(BOXES).float())


def test_a_flip_mirrors_and_a_size_multiplies():
    image, targets = scene([(5, 8, 30, 40)])
    targets["area"] = torch.tensor([200.0])
    x, y = ForTraining(((160, 120),), PLAIN, flip=0)(image, targets)
    assert (x.shape, x.dtype, y["boxes"].tolist()) == ((3, 120, 160), torch.float32, [[10, 16, 60, 80]])
    # the object's share of its box stays
    assert y["area"].tolist() == [800]
    _, y = ForTraining(((160, 120),), PLAIN, flip=1)(image, targets)
    assert y["boxes"].tolist() == [[100, 16, 150, 80]]


def test_every_scale_is_drawn_and_no_other():
    image, targets = scene([(5, 8, 30, 40)], 48, 64)
    transform = ForTraining(((1333, 640), (1333, 800)), PLAIN)
    sizes = set()
    for seed in range(8):
        torch.manual_seed(seed)
        sizes.add(tuple(transform(image, targets)[0].shape[1:]))
    assert sizes == {(640, 853), (800, 1067)}
    assert (DETR_SCALES[0], DETR_SCALES[-1], len(DETR_SCALES)) == ((1333, 480), (1333, 800), 11)
    # the longer side decides here
    wide, targets = scene([(0, 0, 10, 10)], 20, 80)
    assert ForTraining(((1333, 640),), PLAIN)(wide, targets)[0].shape == (3, 333, 1333)


def test_crops_have_the_sides_of_detr_and_drop_what_is_outside(monkeypatch):
    seen = []
    resize = torch.nn.functional.interpolate

    def spied(x, *args, **kwargs):
        seen.append(tuple(x.shape[-2:]))
        return resize(x, *args, **kwargs)

    monkeypatch.setattr("torchvision.transforms.v2.functional._geometry.interpolate", spied)
    image, targets = scene([(2, 2, 6, 6), (50, 30, 78, 58)])
    del targets["masks"]
    # to sizes that are not in the way of the crops' own
    transform = ForTraining(((64, 48),), PLAIN, DETR_CROP_SCALES)
    kept = []
    for seed in range(60):
        torch.manual_seed(seed)
        seen.clear()
        x, y = transform(image, targets)
        assert max(x.shape[1:]) <= 64
        assert min(x.shape[1:]) <= 48
        if len(seen) == 2:
            height, width = seen[1]
            assert 384 <= height <= 600
            assert 384 <= width <= 600
            kept.append(y["labels"].tolist())
        else:
            assert y["labels"].tolist() == [0, 1]
        assert {len(value) for value in y.values()} == {len(y["boxes"])}
        assert ((y["boxes"][:, 2:] - y["boxes"][:, :2]) > 1e-3).all()
        assert y["boxes"].min() >= 0 if len(y["boxes"]) else True
    # half of the images are cut
    assert 20 <= len(kept) <= 40
    assert [] in kept or [1] in kept
    assert [0, 1] in kept


def test_a_crop_without_an_object_is_an_image_without_objects():
    image, targets = scene([(0, 0, 2, 2)], 60, 80)
    transform = ForTraining(((64, 48),), PLAIN, DETR_CROP_SCALES)
    for seed in range(30):
        torch.manual_seed(seed)
        x, y = transform(image, targets)
        if len(y["boxes"]) == 0:
            break
    assert {key: tuple(value.shape) for key, value in y.items()} == {
        "boxes": (0, 4), "labels": (0,), "crowd": (0,), "area": (0,), "masks": (0, *x.shape[1:]),
    }  # fmt: skip
    # and such an image goes through, too
    x, y = transform(x.mul(255).byte(), y)
    assert y["masks"].shape == (0, *x.shape[1:])


def test_what_reaches_beyond_the_image_is_clipped_for_training_alone():
    image, targets = scene([(10, 10, 20, 20), (30, 30, 40, 40)])
    targets["boxes"] = torch.tensor([[-10.0, 10, 10, 20], [79.9999, 30, 90, 40]])
    targets["area"] = torch.tensor([200.0, 100.0])
    _, y = ForTraining(((80, 60),), PLAIN, flip=0)(image, targets)
    assert (y["boxes"].tolist(), y["area"].tolist(), y["labels"].tolist()) == ([[0, 10, 10, 20]], [100], [0])
    _, y = ForEvaluation((160, 120), PLAIN)(image, targets)
    assert torch.equal(y["boxes"], targets["boxes"])


def test_colours_are_distorted_and_boxes_are_not():
    image, targets = scene([(10, 10, 20, 20)])
    image = image // 2 + 50
    torch.manual_seed(1)
    drawn = [ForTraining(((80, 60),), PLAIN, flip=0, distort=True)(image, targets) for _ in range(8)]
    assert len({x.mean().item() for x, _ in drawn}) > 4
    assert all(torch.equal(y["boxes"], targets["boxes"]) for _, y in drawn)


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"\(longer side, shorter side\) in pixels, got \(640, 1333\)"):
        ForTraining(((640, 1333),), PLAIN)
    with pytest.raises(ValueError, match=r"got \(10, 0\)"):
        ForEvaluation((10, 0), PLAIN)
    with pytest.raises(ValueError, match="scales must have at least one"):
        ForTraining((), PLAIN)


def test_for_evaluation_the_image_is_fitted_and_predictions_come_back():
    image, targets = scene(BOXES)
    x, y = ForEvaluation((200, 90), PLAIN)(image, targets)
    assert x.shape == (3, 90, 120)
    assert all(torch.equal(value, targets[key]) for key, value in y.items())
    there = rescaled({"boxes": y["boxes"], "masks": y["masks"].float(), "scores": torch.ones(3)}, (60, 80), (90, 120))
    assert there["boxes"][0].tolist() == [7.5, 12, 45, 60]
    for i, box in enumerate(there["boxes"]):
        # what a network sees there and what is predicted there are the same
        assert (rectangle(x[i] > 0.5) - box).abs().max() <= 1
        assert (rectangle(there["masks"][i] > 0.5) - box).abs().max() <= 1
    back = rescaled(there, (90, 120), (60, 80))
    torch.testing.assert_close(back["boxes"], targets["boxes"])
    assert torch.equal(back["masks"] > 0.5, targets["masks"].bool())
    assert set(back) == {"boxes", "masks", "scores"}
    with pytest.raises(
        ValueError, match=r"masks must be of the size that boxes are scaled from, \(60, 80\), got \[3, 90"
    ):
        rescaled(there, (60, 80), (90, 120))
    empty = rescaled({"boxes": torch.empty(0, 4), "masks": torch.empty(0, 60, 80)}, (60, 80), (90, 120))
    assert (empty["boxes"].shape, empty["masks"].shape) == ((0, 4), (0, 90, 120))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "a"}]}
    for id, size in ((11, (80, 60)), (12, (40, 60)), (15, (50, 50))):
        Image.new("RGB", size, (id, 100, 200)).save(tmp_path / f"train/{id}.png")
        content["images"].append({"id": id, "file_name": f"{id}.png", "width": size[0], "height": size[1]})
        box = {"bbox": [5, 5, 20, 10], "segmentation": [[5, 5, 25, 5, 25, 15, 5, 15]]}
        content["annotations"].append({"id": id, "image_id": id, "category_id": 3, **box})
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    return CocoImages(tmp_path, "train", masks=True)


def test_batches_are_lists_and_know_their_images(images):
    boxes = BoxSet(images, ForEvaluation((160, 120), PLAIN))
    assert (len(boxes), boxes.classes) == (3, ("a",))
    # in a process of its own
    for x, y in DataLoader(boxes, 3, collate_fn=listed, num_workers=1):
        assert [tuple(image.shape) for image in x] == [(3, 120, 160), (3, 160, 107), (3, 120, 120)]
        assert [targets["image_id"].item() for targets in y] == [11, 12, 15]
        assert [targets["size"].tolist() for targets in y] == [[60, 80], [60, 40], [50, 50]]
        assert y[0]["image_id"].dtype == y[0]["size"].dtype == torch.int64
        assert y[1]["masks"].shape == (1, 60, 40)


def test_what_is_drawn_belongs_to_seed_epoch_and_image(images):
    training = BoxSet(images, ForTraining(((160, 120), (96, 64)), PLAIN, ((512, 400),), distort=True))
    drawn = [[Drawn(training, seed)[Draw(epoch, 0)] for epoch in range(4)] for seed in (0, 0, 1)]
    for (x, y), (same, too) in zip(drawn[0], drawn[1], strict=True):
        assert torch.equal(x, same)
        assert all(torch.equal(value, too[key]) for key, value in y.items())
    assert len({x.double().sum().item() for x, _ in [*drawn[0], *drawn[2]]}) == 8
