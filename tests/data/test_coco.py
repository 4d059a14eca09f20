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

from replknet import limits
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


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"id": True}, r'annotations\[1\] must have a whole number "id", got'),
        ({"id": 10**30}, r'annotations\[1\] must have a whole number "id", got'),
        ({"id": 5.0}, r'annotations\[1\] must have a whole number "id", got'),
        ({"image_id": True}, "annotation of an image that is not listed"),
        ({"category_id": True}, "annotation of a category that is not listed"),
        ({"bbox": [True, 2, 3, 3]}, "annotation without a box of four finite numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "annotation without a box of four finite numbers"),
        ({"iscrowd": "0"}, 'annotation with an "iscrowd" that is neither 0 nor 1'),
        ({"iscrowd": [[]]}, 'annotation with an "iscrowd" that is neither 0 nor 1'),
        ({"segmentation": [[1e7, 2, 4, 2, 4, 4]]}, "annotation with a segmentation that is neither polygons"),
        ({"segmentation": [[1, 2, 4, 2, 4, True]]}, "annotation with a segmentation that is neither polygons"),
        ({"segmentation": {"size": [8, 10], "counts": [80, False]}}, "annotation with a segmentation that is neither"),
        ({"segmentation": {"size": [8, 10], "counts": "o" * 10**6}}, "annotation with a segmentation that is neither"),
    ],
)
def test_no_extreme_value_passes(tmp_path, entry, kind):
    polygon = {"segmentation": [[1, 2, 4, 2, 4, 4]]}
    write(tmp_path, [annotation(4, **polygon), {**annotation(5, **polygon), **entry}])
    with pytest.raises(ImageError, match=kind) as error:
        CocoImages(tmp_path, "train", masks=True)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"images": ' + b'{"a":' * 50_000, b"1" * 5000, "é".encode("latin-1"), b'{"images": [1e999}'],
)
def test_text_that_is_no_json_is_one_line(tmp_path, text):
    write(tmp_path, [])
    (tmp_path / "annotations/instances_train.json").write_bytes(text)
    with pytest.raises(ImageError, match=r"instances_train.json cannot be read as (JSON|text in UTF-8): ") as error:
        CocoImages(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_polygons_far_outside_fill_their_image(tmp_path):
    far = 999_999.0
    write(
        tmp_path,
        [
            annotation(1, segmentation=[[-far, -far, far, -far, far, far, -far, far]]),
            annotation(2, segmentation=[[far, -far, far, far, -far, far, -far, -far] * 10]),
            annotation(3, segmentation=[[5, -far, far, -far, far, far, 5, far]]),
        ],
    )
    masks = CocoImages(tmp_path, "train", masks=True)[0][1]["masks"]
    assert masks.sum((1, 2)).tolist() == [80, 0, 40]


def test_masks_are_bounded_before_they_are_made(tmp_path, monkeypatch):
    square = [[1, 2, 4, 2, 4, 4]]
    write(tmp_path, [annotation(id, segmentation=square) for id in range(3)])
    images = CocoImages(tmp_path, "train", masks=True)
    monkeypatch.setattr(limits, "MASK_PIXELS", 239)
    with pytest.raises(ImageError, match=r"train/1.png \(image 1\) asks for 240 pixels in the masks of an image, more"):
        images[0]
    monkeypatch.setattr(limits, "MASK_PIXELS", 240)
    monkeypatch.setattr(limits, "CROSSINGS", 17)
    with pytest.raises(ImageError, match=r"asks for 18 columns crossed by the edges of an image's polygons, more than"):
        images[0]
    monkeypatch.setattr(limits, "CROSSINGS", 18)
    assert images[0][1]["masks"].shape == (3, 8, 10)


def test_a_size_that_no_image_may_have_is_named(tmp_path):
    content = write(tmp_path, [annotation(1), annotation(2, 2)])
    for side in (10**5, 10**9):
        content["images"][0] |= {"width": side, "height": side}
        rewrite(tmp_path, content)
        with pytest.raises(ImageError, match=r"image of more pixels than REPLKNET_LIMITS allows \(1\): 1; correct it"):
            CocoImages(tmp_path, "train")
        assert CocoImages(tmp_path, "train", malformed="skip").image_ids == (2, 7)
    for side in (True, 10**30, "10", None):
        content["images"][0] |= {"width": side, "height": 8}
        rewrite(tmp_path, content)
        # the image itself says it
        assert CocoImages(tmp_path, "train").sizes[0].tolist() == [8, 10]


def test_the_area_of_a_large_object_is_kept(tmp_path):
    write(tmp_path, [annotation(1, area=4e6)])
    assert CocoImages(tmp_path, "train")[0][1]["area"].tolist() == [4e6]


def test_names_of_categories_have_no_control_characters(tmp_path):
    write(tmp_path, [annotation(1)], categories=[{"id": 1, "name": "a\x1b[2J\ud800"}])
    assert CocoImages(tmp_path, "train").classes == ("a\\x1b[2J\\ud800",)
    write(tmp_path, [annotation(1)], categories=[{"id": 1, "name": "a" * 10_000}])
    with pytest.raises(ImageError, match="asks for 10,000 letters in the name of a class, more than the 1,000 allowed"):
        CocoImages(tmp_path, "train")


def test_an_error_names_some_kinds_of_problems_and_counts_the_others(tmp_path):
    polygon = {"segmentation": [[1, 2, 4, 2, 4, 4]]}
    spoiled = [{**annotation(i, **polygon), **more} for i, more in enumerate(SPOILED.values())]
    write(tmp_path, spoiled)
    with pytest.raises(ImageError, match=r"; and 3 other kinds; correct it, or leave it out"):
        CocoImages(tmp_path, "train", masks=True)


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
