"""Images with masks that anything can learn: sky over grass with a sun, each in its colour."""

import json

import numpy as np
from PIL import Image

CLASSES = {"classes": ["grass", "sky", "sun"], "palette": [[0, 200, 0], [0, 0, 200], [250, 250, 0]]}


def draw(folder):
    """Write 12 images for training, 5 for validation and 3 for a test, of 40x60 pixels."""
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5), ("test", 3)):
        for i in range(count):
            mask = np.zeros((40, 60), np.uint8)
            mask[: random.integers(12, 28)] = 1
            y, x = random.integers(0, 8), random.integers(0, 48)
            mask[y : y + 8, x : x + 8] = 2
            image = np.array(CLASSES["palette"])[mask] + random.integers(0, 6, (40, 60, 3))
            mask[:2] = 255
            for kind, array in (("images", image.astype(np.uint8)), ("annotations", mask)):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / kind / split / f"{i}.png")
