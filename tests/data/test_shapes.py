"""Drawn shapes: as many as asked for, each where its annotation says."""

import numpy as np

from replknet.data.coco import CocoImages
from replknet.data.shapes import CLASSES, write_shapes


def test_shapes_are_where_their_masks_are(tmp_path):
    write_shapes(tmp_path, {"train": 6, "val": 2})
    images = CocoImages(tmp_path, "train", masks=True)
    assert (len(images), images.classes, images.problems) == (6, CLASSES, ())
    assert len(CocoImages(tmp_path, "val")) == 2
    seen = 0
    for picture, targets in (images[i] for i in range(6)):
        pixels = np.asarray(picture).astype(int)
        # no shape lies over another
        assert targets["masks"].sum(0).max() <= 1
        for mask, box, area in zip(targets["masks"].numpy(), targets["boxes"], targets["area"], strict=True):
            y, x = mask.nonzero()
            found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert np.abs(np.array(found) - box.numpy()).max() <= 1.5
            assert abs(mask.sum() - area) < 0.2 * area
            # one colour but for the edge
            inside = pixels[mask.astype(bool)]
            assert (inside == np.median(inside, 0)).all(1).mean() > 0.8
            seen += 1
    assert seen >= 6


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shapes(tmp_path / name, {"train": 2}, seed)
    texts = [(tmp_path / name / "annotations" / "instances_train.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
