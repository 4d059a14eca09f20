"""Images with a class a pixel: layouts, labels, errors that name the file, and what happens to both together."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from replknet.data.images import ImageError
from replknet.data.mask_transforms import ForEvaluation, ForTraining, Normalize, fitted
from replknet.data.masks import IGNORE, Classes, MaskSet, Pairs, shipped_classes

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid" / "camvid.zip"
PLAIN = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def write(folder, image, mask, values, size=(8, 6)):
    for name in (image, mask):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(folder / image)
    labels = np.resize(np.array(values, np.uint8), size[::-1])
    Image.fromarray(labels).save(folder / mask)


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}))
    for split in ("train", "val"):
        for name in ("1", "2"):
            write(tmp_path, f"images/{split}/{name}.jpg", f"annotations/{split}/{name}.png", [0, 1, 255])
    return tmp_path


def test_a_folder_and_its_zip_give_the_same(pairs, tmp_path):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in pairs.rglob("*"):
            if path.is_file() and path != archive:
                file.write(path, path.relative_to(pairs))
    for split in ("train", "val"):
        plain, zipped = Pairs("masks", pairs, split), Pairs("masks", archive, split)
        # as a worker gets it
        zipped = pickle.loads(pickle.dumps(zipped))
        assert plain.names == zipped.names
        assert plain.classes.names == ("a", "b")
        for (image, mask), (same, too) in zip(plain, zipped, strict=True):
            assert image.tobytes() == same.tobytes()
            assert torch.equal(mask, too)
            assert mask.unique().tolist() == [0, 1, IGNORE]


def test_ade20k_leaves_out_zero(tmp_path):
    for split in ("training", "validation"):
        write(tmp_path, f"images/{split}/x.jpg", f"annotations/{split}/x.png", [0, 1, 150])
    (_, mask), *_ = Pairs("ade20k", tmp_path, "val")
    assert mask.unique().tolist() == [0, 149, IGNORE]
    classes = shipped_classes("ade20k")
    assert (len(classes.names), classes.names[0], classes.names[149]) == (150, "wall", "flag")
    assert len(set(classes.palette)) > 140
    with pytest.raises(ValueError, match="255 is no class: at most 255 fit into a mask, got 256"):
        Classes(["x"] * 256, [(0, 0, 0)] * 256)


def test_cityscapes_scores_19_of_its_labels(tmp_path):
    write(
        tmp_path, "leftImg8bit/val/bonn/bonn_0_leftImg8bit.png", "gtFine/val/bonn/bonn_0_gtFine_labelIds.png",
        [0, 7, 8, 26, 33, 34 - 1, 255],
    )  # fmt: skip
    (_, mask), *_ = Pairs("cityscapes", tmp_path, "val")
    # road, sidewalk, car and bicycle
    assert mask.unique().tolist() == [0, 1, 13, 18, IGNORE]
    assert shipped_classes("cityscapes").names[13] == "car"


def test_what_does_not_fit_is_named(pairs):
    with pytest.raises(ImageError, match=r"expected images in images/test/ and masks in annotations/test/ .* found no"):
        Pairs("masks", pairs, "test")
    with pytest.raises(ImageError, match="is neither"):
        Pairs("masks", pairs / "none", "train")
    with pytest.raises(ImageError, match=r"expected images in leftImg8bit/train/ .* the layout of 'cityscapes'"):
        Pairs("cityscapes", pairs, "train")
    (pairs / "annotations/val/2.png").unlink()
    with pytest.raises(ImageError, match=r"1 of the 2 images in images/val/ .* mask: expected annotations/val/2.png"):
        Pairs("masks", pairs, "val")
    write(pairs, "images/train/1.jpg", "annotations/train/1.png", [0, 1, 2, 7])
    with pytest.raises(ImageError, match=r"train/1.png has labels that are no class: 2, 7; expected 0 to 1 and 255"):
        Pairs("masks", pairs, "train")[0]
    Image.new("L", (5, 5)).save(pairs / "annotations/train/1.png")
    with pytest.raises(ImageError, match=r"train/1.png must be as large as its image, \(8, 6\), got \(5, 5\)"):
        Pairs("masks", pairs, "train")[0]
    Image.new("RGB", (8, 6)).save(pairs / "annotations/train/1.png")
    with pytest.raises(ImageError, match=r"train/1.png must have one channel of 8 bits .* got mode RGB"):
        Pairs("masks", pairs, "train")[0]
    (pairs / "images/train/1.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"images/train/1.jpg cannot be read as an image"):
        Pairs("masks", pairs, "train")[0]
    (pairs / "classes.json").write_text('{"classes": ["a"]}')
    with pytest.raises(
        ImageError, match=r'classes.json in .* must be JSON with the lists "classes" \(names\) and "palette"'
    ):
        Pairs("masks", pairs, "train")
    (pairs / "classes.json").unlink()
    with pytest.raises(ImageError, match=r"expected classes.json in .*, with \"classes\""):
        Pairs("masks", pairs, "train")


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ({"classes": "ab", "palette": [[1, 2, 3]] * 2}, 'JSON with the lists "classes"'),
        ({"classes": ["a"], "palette": [[1, 2]]}, r"a colour has three whole numbers from 0 to 255, got \(1, 2\)"),
        ({"classes": ["a"], "palette": [[1, 2, 256]]}, "a colour has three whole numbers from 0 to 255"),
        ({"classes": ["a"], "palette": [[1, 2, True]]}, "a colour has three whole numbers from 0 to 255"),
        ({"classes": ["a"], "palette": [3]}, "cannot be read as classes and their colours"),
        ({"classes": [1], "palette": [[1, 2, 3]]}, "must name each class by a text, got 1"),
        ({"classes": ["a"] * 300, "palette": [[1, 2, 3]] * 300}, "255 is no class: at most 255 fit into a mask"),
        ([], 'JSON with the lists "classes"'),
    ],
)
def test_classes_are_checked(pairs, classes, match):
    (pairs / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(ImageError, match=rf"classes.json in .*{match}"):
        Pairs("masks", pairs, "train")


def test_a_list_of_classes_has_a_limit_in_folders_and_archives(pairs, tmp_path):
    (pairs / "classes.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ImageError, match=r"classes.json in .* cannot be read as JSON: it is nested too deeply"):
        Pairs("masks", pairs, "train")
    (pairs / "classes.json").write_bytes(b" " * 20_000_000)
    with pytest.raises(ImageError, match=r"classes.json asks for 20,000,000 bytes, more than the 16,777,216 allowed"):
        Pairs("masks", pairs, "train")
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(pairs / "classes.json", "classes.json")
    with pytest.raises(
        ImageError, match=r"classes.json asks for 20,000,000 bytes when it is unpacked, more than the 2,"
    ):
        Pairs("masks", tmp_path / "all.zip", "train")


def test_names_of_pairs_that_are_no_utf_8_work(pairs):
    for folder, ending in (("images", ".jpg"), ("annotations", ".png")):
        (pairs / folder / "train" / f"1{ending}").rename(pairs / folder / "train" / f"\udcff{ending}")
    found = Pairs("masks", pairs, "train")
    assert [tuple(mask.shape) for _, mask in found] == [(6, 8), (6, 8)]
    (pairs / "images/train/\udcff.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"images/train/\\xff.jpg cannot be read as an image: its header"):
        found[1]


def test_a_very_long_image_keeps_a_pixel():
    assert fitted(1, 60_000, 2048, 512) == (1, 2048)


def test_a_size_is_fitted_as_in_mmsegmentation():
    # the longer side decides, then the shorter; half pixels are rounded up
    assert fitted(360, 480, 2048, 512) == (512, 683)
    assert fitted(1024, 2048, 2048, 512) == (512, 1024)
    assert fitted(100, 1000, 2048, 512) == (205, 2048)


def scene(height=40, width=60):
    """An image whose first channel is the label of its pixel, so that what moves together can be seen."""
    mask = (torch.arange(height)[:, None] // 10 + torch.arange(width) // 10).to(torch.uint8)
    return torch.stack([mask, mask * 0, mask * 0]), mask


def test_image_and_mask_move_together():
    image, mask = scene()
    transform = ForTraining((32, 48), None, (1.0, 1.0), PLAIN, distort=False)
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = transform(image, mask)
        assert (x.shape, y.shape, y.dtype) == ((3, 32, 48), (32, 48), torch.uint8)
        torch.testing.assert_close(x[0] * 255, y.float())


def test_what_a_crop_lacks_is_not_trained_on():
    image, mask = scene()
    torch.manual_seed(0)
    x, y = ForTraining((64, 64), (60, 40), (0.5, 0.5), PLAIN, distort=False)(image, mask)
    assert (y[:20, :30] != IGNORE).all()
    assert (y[20:] == IGNORE).all()
    assert (y[:, 30:] == IGNORE).all()
    assert (x[:, 20:] == 0).all()


def test_a_crop_of_one_class_is_drawn_again():
    mask = torch.zeros(40, 400, dtype=torch.uint8)
    mask[:, 380:] = 1
    image = mask.expand(3, -1, -1)

    def both(share):
        torch.manual_seed(0)
        transform = ForTraining((40, 40), None, (1.0, 1.0), PLAIN, largest_share=share, distort=False)
        return sum(len(transform(image, mask)[1].unique()) == 2 for _ in range(50))

    assert both(0.75) > both(1.0)


def test_colours_are_distorted_and_the_mask_is_not():
    image, mask = torch.full((3, 40, 60), 100, dtype=torch.uint8), scene()[1]
    torch.manual_seed(1)
    drawn = [ForTraining((40, 60), None, (1.0, 1.0), PLAIN)(image, mask) for _ in range(8)]
    assert len({x.mean().item() for x, _ in drawn}) > 4
    assert {y.float().mean().item() for _, y in drawn} == {mask.float().mean().item()}


def test_for_evaluation_the_mask_keeps_its_size():
    image, mask = scene()
    x, y = ForEvaluation(Normalize((0.5,) * 3, (0.5,) * 3))(image, mask)
    assert (x.shape, y.shape) == ((3, 40, 60), (40, 60))
    assert x.min() == -1


def test_camvid():
    if not CAMVID.exists():
        pytest.skip(f"no {CAMVID}: CamVid is not shipped")
    sizes = {split: Pairs("masks", CAMVID, split) for split in ("train", "val", "test")}
    assert {split: len(pairs) for split, pairs in sizes.items()} == {"train": 367, "val": 101, "test": 233}
    assert len(sizes["test"].classes.names) == 11
    x, y = MaskSet(sizes["test"], ForEvaluation(PLAIN))[0]
    assert (x.shape, y.shape) == ((3, 360, 480), (360, 480))
