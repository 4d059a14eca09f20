"""Drawn squares, discs and triangles in COCO's layout: a small data set with masks, to see whether a detector learns.

It is too easy to measure a detector. `python -m replknet.data.shapes DIR` writes it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "disc", "triangle")
_WIDTH, _HEIGHT = 160, 120
_SIDES = (16, 48)  # smallest and largest side of a shape, pixels
_MOST = 4  # shapes in an image
_CORNERS = 24  # of the polygon that stands for a disc


def write_shapes(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write images of 160x120 pixels and their annotations: up to four separate shapes on noise.

    Args:
        folder: where SPLIT/N.png and annotations/instances_SPLIT.json go.
        counts: split -> number of images.
        seed: seed of positions, sizes and colours.
    """
    random = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            background = random.integers(90, 150) + random.integers(-20, 20, (_HEIGHT, _WIDTH, 3))
            picture = Image.fromarray(background.astype(np.uint8))
            for label, polygon in _shapes(random):
                colour = tuple(random.integers(0, 256, 3).tolist())
                ImageDraw.Draw(picture).polygon([tuple(corner) for corner in polygon], fill=colour)
                annotations.append(_annotation(len(annotations) + 1, i, label, polygon))
            picture.save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": _WIDTH, "height": _HEIGHT})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _shapes(random: np.random.Generator) -> list[tuple[int, list[list[float]]]]:
    """Class and corners of each shape in an image; shapes do not touch."""
    found: list[tuple[int, list[list[float]]]] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(random.integers(1, _MOST + 1)):
        side = float(random.integers(*_SIDES))
        x = random.uniform(side / 2, _WIDTH - side / 2)
        y = random.uniform(side / 2, _HEIGHT - side / 2)
        if any(max(abs(x - a), abs(y - b)) < (side + c) / 2 + 2 for a, b, c in taken):
            continue
        taken.append((x, y, side))
        label = int(random.integers(len(CLASSES)))
        found.append((label, _corners(label, x, y, side / 2)))
    return found


def _corners(label: int, x: float, y: float, r: float) -> list[list[float]]:
    if label == 0:
        return [[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r]]
    if label == 2:
        return [[x, y - r], [x + r, y + r], [x - r, y + r]]
    angles = [2 * math.pi * i / _CORNERS for i in range(_CORNERS)]
    return [[x + r * math.cos(a), y + r * math.sin(a)] for a in angles]


def _annotation(id: int, image: int, label: int, polygon: list[list[float]]) -> dict[str, Any]:
    x, y = zip(*polygon, strict=True)
    # the shoelace formula
    area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    return {
        "id": id,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [min(x), min(y), max(x) - min(x), max(y) - min(y)],
        "area": area,
        "iscrowd": 0,
        "segmentation": [[value for corner in polygon for value in corner]],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m replknet.data.shapes DIR")
    write_shapes(Path(sys.argv[1]), {"train": 200, "val": 50, "test": 50})
