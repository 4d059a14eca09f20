"""COCO's JSON: labels, boxes and masks of the right pixels, and errors that count and name what cannot be used."""

import json
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from replknet.data.coco import CocoImages, Problem
from replknet.data.images import ImageError

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd" / "bccd.zip"
CATEGORIES = [{"id": 90, "name": "c"}, {"id": 1, "name": "a"}, {"id": 13, "name": "b"}]


def annotation(id, image_id=1, category_id=1, bbox=(1, 2, 3, 2), **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def write(folder, annotations, categories=CATEGORIES, images=((1, 10, 8), (2, 10, 8), (7, 6, 5)), split="train"):
    """A data set of (id, width, height), and the file of each image."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    entries = [{"id": id, "file_name": f"{id}.png", "width": w, "height": h} for id, w, h in images]
    for entry in entries:
        Image.new("RGB", (entry["width"], entry["height"]), (entry["id"], 0, 0)).save(
            folder / split / entry["file_name"]
        )
    content = {"images": entries, "annotations": annotations, "categories": list(categories)}
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return content


def rewrite(folder, content):
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))


def test_labels_count_from_zero_where_ids_have_gaps(tmp_path):
    write(
        tmp_path,
        [
            annotation(1, 2, 90, (1, 2, 3.5, 2), area=5.5, iscrowd=0),
            annotation(2, 1, 13, (-1, 0, 4, 4)),
            annotation(3, 2, 1, (0, 0, 2, 2), area=1, iscrowd=1),
        ],
    )
    images = CocoImages(tmp_path, "train")
    assert (images.classes, images.category_ids, images.image_ids) == (("a", "b", "c"), (1, 13, 90), (1, 2, 7))
    assert images.sizes.tolist() == [[8, 10], [8, 10], [5, 6]]
    image, targets = images[1]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (10, 8), (2, 0, 0))
    assert {key: (value.dtype, value.tolist()) for key, value in targets.items()} == {
        "boxes": (torch.float32, [[1, 2, 4.5, 4], [0, 0, 2, 2]]),
        "labels": (torch.int64, [2, 0]),
        "crowd": (torch.bool, [False, True]),
        "area": (torch.float32, [5.5, 1]),
    }
    # what reaches beyond the image stays as it is annotated, and the box's area stands in for none
    targets = images[0][1]
    assert (targets["boxes"].tolist(), targets["area"].tolist()) == ([[-1, 0, 3, 4]], [16])
    assert [tuple(value.shape) for value in images[2][1].values()] == [(0, 4), (0,), (0,), (0,)]
    # changing an item leaves the data set alone
    targets["boxes"].zero_()
    assert images[0][1]["boxes"].tolist() == [[-1, 0, 3, 4]]


def test_images_without_objects_can_be_left_out(tmp_path):
    write(tmp_path, [annotation(1, 2)])
    assert CocoImages(tmp_path, "train").image_ids == (1, 2, 7)
    images = CocoImages(tmp_path, "train", empty=False)
    assert (images.image_ids, len(images), images[0][1]["labels"].tolist()) == ((2,), 1, [0])
    write(tmp_path, [])
    assert [len(targets["boxes"]) for _, targets in CocoImages(tmp_path, "train")] == [0, 0, 0]
    with pytest.raises(ImageError, match="has no image that can be used; 3 are listed"):
        CocoImages(tmp_path, "train", empty=False)


def test_polygons_and_both_codes_give_the_right_pixels(tmp_path):
    square = torch.zeros(8, 10, dtype=torch.uint8)
    square[2:4, 1:4] = 1
    plus = square.clone()
    plus[5:7, 6:9] = 1
    # column by column: 8 + 2 outside, then 2 inside and 6 outside, three times
    counts = [10, 2, 6, 2, 6, 2, 80 - 28]
    code = rle.encode(np.asfortranarray(plus.numpy()))["counts"].decode()
    first, second = [1, 2, 4, 2, 4, 4, 1, 4], [6, 5, 9, 5, 9, 7, 6, 7]
    write(
        tmp_path,
        [
            annotation(1, segmentation=[first]),
            annotation(2, segmentation=[first, second]),
            annotation(3, segmentation={"size": [8, 10], "counts": counts}, iscrowd=1),
            annotation(4, segmentation={"size": [8, 10], "counts": code}),
            annotation(5, segmentation={"size": [8, 10], "counts": [0, 80]}),
        ],
    )
    masks = CocoImages(tmp_path, "train", masks=True)[0][1]["masks"]
    assert (masks.dtype, masks.shape) == (torch.uint8, (5, 8, 10))
    for mask, expected in zip(masks, (square, plus, square, plus, torch.ones_like(plus)), strict=True):
        assert torch.equal(mask, expected)
    assert CocoImages(tmp_path, "train", masks=True)[1][1]["masks"].shape == (0, 8, 10)
    assert "masks" not in CocoImages(tmp_path, "train")[0][1]


def test_the_compressed_code_is_read_as_pycocotools_writes_it(tmp_path):
    random = np.random.default_rng(0)
    expected = [(random.random((50, 70)) < share).astype(np.uint8) for share in (0.001, 0.02, 0.5, 0.99, 1)]
    codes = [rle.encode(np.asfortranarray(mask)) for mask in expected]
    annotations = [
        annotation(i, 1, segmentation={"size": [50, 70], "counts": code["counts"].decode()})
        for i, code in enumerate(codes)
    ]
    write(tmp_path, annotations, images=((1, 70, 50),))
    assert np.array_equal(CocoImages(tmp_path, "train", masks=True)[0][1]["masks"].numpy(), np.stack(expected))


def test_a_folder_and_its_zip_give_the_same(tmp_path):
    folder = tmp_path / "folder"
    write(
        folder,
        [annotation(1, segmentation=[[1, 2, 4, 2, 4, 4]]), annotation(2, 7, 13, segmentation=[[0, 0, 2, 2, 0, 2]])],
    )
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder))
    plain = CocoImages(folder, "train", masks=True)
    zipped = CocoImages(archive, "train", masks=True)
    zipped[0]
    # as a worker gets it
    zipped = pickle.loads(pickle.dumps(zipped))
    assert (plain.classes, plain.image_ids) == (zipped.classes, zipped.image_ids)
    for (image, targets), (same, too) in zip(plain, zipped, strict=True):
        assert image.tobytes() == same.tobytes()
        assert all(torch.equal(value, too[key]) for key, value in targets.items())


def test_cocos_own_names_are_found(tmp_path):
    write(tmp_path, [annotation(1)])
    (tmp_path / "annotations/instances_train.json").rename(tmp_path / "annotations/instances_train2017.json")
    (tmp_path / "train").rename(tmp_path / "train2017")
    assert len(CocoImages(tmp_path, "train")) == 3
    with pytest.raises(
        ImageError,
        match=r"expected annotations/instances_val2017.json or annotations/instances_val.json in .*, but found "
        r"annotations/instances_train2017.json",
    ):
        CocoImages(tmp_path, "val")


# a way to spoil the annotation with id 5 -> what the error says of it
SPOILED = {
    "annotation of an image that is not listed": {"image_id": 3},
    "annotation of a category that is not listed": {"category_id": 2},
    "annotation without a box of four finite numbers": {"bbox": [1, 2, math.nan, 3]},
    "annotation with a box without width or height": {"bbox": [1, 2, 3, 0]},
    "annotation with a box outside its image": {"bbox": [10, 2, 3, 3]},
    "annotation with the id of another": {"id": 4},
    "annotation without a segmentation": {"segmentation": []},
    "annotation with a segmentation that is neither polygons nor runs that fill its image": {
        "segmentation": {"size": [8, 10], "counts": [5, 3]}
    },
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_cannot_be_used_is_named_and_left_out_if_wished(tmp_path, kind):
    polygon = {"segmentation": [[1, 2, 4, 2, 4, 4]]}
    annotations = [annotation(id, image_id, **polygon) for id, image_id in ((4, 1), (5, 1), (6, 2))]
    annotations[1] |= SPOILED[kind]
    write(tmp_path, annotations)
    id = annotations[1]["id"]
    with pytest.raises(ImageError, match=rf'{kind} \(1\): {id}; correct it, or leave it out with malformed="skip"'):
        CocoImages(tmp_path, "train", masks=True)
    images = CocoImages(tmp_path, "train", masks=True, malformed="skip")
    assert images.problems == (Problem(kind, (id,)),)
    assert [len(targets["masks"]) for _, targets in images] == [1, 1, 0]


@pytest.mark.parametrize(
    "bbox", [[1, 2, -3, 3], [-3, 2, 3, 3], [1, 8, 3, 3], [1, 2, 3], None, ["1", 2, 3, 3], [1, 2, math.inf, 3]]
)
def test_no_bad_box_passes(tmp_path, bbox):
    write(tmp_path, [annotation(4), {**annotation(5), "bbox": bbox}])
    images = CocoImages(tmp_path, "train", malformed="skip")
    assert [problem.ids for problem in images.problems] == [(5,)]
    assert len(images[0][1]["boxes"]) == 1


@pytest.mark.parametrize(
    "segmentation",
    [
        None, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, math.nan]], [1, 2, 3, 4, 5, 6], "code",
        {"size": [10, 8], "counts": [80]}, {"size": [8, 10], "counts": [90, -10]}, {"size": [8, 10], "counts": "@"},
        {"size": [8, 10], "counts": "é"}, {"size": [8, 10], "counts": "0"}, {"size": [8, 10]},
    ],
)  # fmt: skip
def test_no_bad_segmentation_passes(tmp_path, segmentation):
    # pycocotools reads beyond its memory in some of these
    write(tmp_path, [annotation(4), annotation(5, segmentation=segmentation)])
    images = CocoImages(tmp_path, "train", masks=True, malformed="skip")
    assert [problem.ids for problem in images.problems] == [(4, 5)] if segmentation is None else [(4,), (5,)]
    assert CocoImages(tmp_path, "train").problems == ()


def test_problems_are_counted_and_the_first_are_named(tmp_path):
    annotations = [annotation(id, bbox=(1, 1, 0, 1)) for id in range(10, 17)] + [annotation(3, category_id=5)]
    content = write(tmp_path, [*annotations, annotation(2)])
    content["images"].append({**content["images"][0], "file_name": "none.png"})
    content["images"].append({"id": 9, "file_name": "none.png", "width": 4, "height": 4})
    content["categories"].append({"id": 13, "name": "again"})
    content["annotations"].append(annotation(30, 9))
    rewrite(tmp_path, content)
    with pytest.raises(
        ImageError,
        match=r"category with the id of another \(1\): 13; image with the id of another \(1\): 1; image whose file is "
        r"missing \(1\): 9; annotation with a box without width or height \(7\): 10, 11, 12, 13, 14, \.\.\.; "
        r"annotation of a category that is not listed \(1\): 3;",
    ):
        CocoImages(tmp_path, "train")
    images = CocoImages(tmp_path, "train", malformed="skip")
    assert (images.image_ids, images.classes) == ((1, 2, 7), ("a", "b", "c"))
    assert [len(targets["boxes"]) for _, targets in images] == [1, 0, 0]
    assert [len(problem.ids) for problem in images.problems] == [1, 1, 1, 7, 1]


def test_another_structure_is_an_error_always(tmp_path):
    content = write(tmp_path, [annotation(1)])

    def refused(match):
        with pytest.raises(ImageError, match=match):
            CocoImages(tmp_path, "train", malformed="skip")

    for key in ("images", "annotations", "categories"):
        rewrite(tmp_path, {other: value for other, value in content.items() if other != key})
        refused('must have lists "images", "annotations" and "categories", got ')
    rewrite(tmp_path, [1])
    refused(r'must have lists "images", "annotations" and "categories", got list')
    rewrite(tmp_path, {**content, "images": [{"id": 1}]})
    refused(r"images\[0\] must have a whole number \"id\" and a text \"file_name\", got {'id': 1}")
    rewrite(tmp_path, {**content, "annotations": [{"bbox": 1}]})
    refused(r"annotations\[0\] must have a whole number \"id\", got {'bbox': 1}")
    (tmp_path / "annotations/instances_train.json").write_text("{")
    refused("instances_train.json cannot be read as JSON: Expecting property")
    with pytest.raises(ImageError, match="is neither"):
        CocoImages(tmp_path / "none", "train")


def test_an_image_of_another_size_is_named_when_it_is_read(tmp_path):
    write(tmp_path, [annotation(1)])
    Image.new("RGB", (8, 10)).save(tmp_path / "train/1.png")
    (tmp_path / "train/2.png").write_bytes(b"no image")
    images = CocoImages(tmp_path, "train")
    with pytest.raises(ImageError, match=r"train/1.png \(image 1\) must be of the size in .*, 10x8, got 8x10; correct"):
        images[0]
    with pytest.raises(ImageError, match=r"train/2.png cannot be read as an image"):
        images[1]


def test_a_size_that_the_json_lacks_is_read(tmp_path):
    content = write(tmp_path, [annotation(1)])
    del content["images"][2]["width"]
    rewrite(tmp_path, content)
    assert CocoImages(tmp_path, "train").sizes.tolist() == [[8, 10], [8, 10], [5, 6]]


def test_bccd():
    if not BCCD.exists():
        pytest.skip(f"no {BCCD}: BCCD is not shipped")
    sets = {split: CocoImages(BCCD, split) for split in ("train", "val", "test")}
    assert {split: len(images) for split, images in sets.items()} == {"train": 205, "val": 87, "test": 72}
    assert sets["train"].classes == ("Platelets", "RBC", "WBC")
    counts = {split: images._labels.bincount().tolist() for split, images in sets.items()}
    assert counts == {"train": [209, 2381, 214], "val": [83, 967, 87], "test": [69, 805, 71]}
    assert all(images.problems == () for images in sets.values())
    image, targets = sets["val"][0]
    assert image.size == (640, 480)
    assert targets["boxes"].min() >= 0
