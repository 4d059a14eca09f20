"""Images with a class for each pixel: ADE20K, Cityscapes, and any folder or zip archive of pairs, such as CamVid."""

import io
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from replknet import limits
from replknet.data.files import Files, brief, json_of
from replknet.data.images import ImageError, class_names, decoded, pixels
from replknet.reading import Kind, reading
from replknet.shown import shown

# label of a pixel that training and scores leave out
IGNORE = 255

_IMAGES = (".jpg", ".jpeg", ".png")
_CLASSES = Kind(ImageError, "classes and their colours", "correct it")


@dataclass(frozen=True)
class Classes:
    """Names and colours of the classes, in the order of the labels."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]  # RGB, 0 to 255

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "palette", tuple(tuple(colour) for colour in self.palette))
        for colour in self.palette:
            if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
                raise ValueError(f"a colour has three whole numbers from 0 to 255, got {reprlib.repr(colour)}")
        if len(self.names) > IGNORE:
            raise ValueError(f"{IGNORE} is no class: at most {IGNORE} fit into a mask, got {len(self.names)}")
        if not self.names or len(self.names) != len(self.palette):
            raise ValueError(f"each class needs a colour, got {len(self.names)} names and {len(self.palette)} colours")


@cache
def shipped_classes(name: str) -> Classes:
    """The classes of "ade20k" (150) or "cityscapes" (19)."""
    return _parsed((Path(__file__).parent / "classes" / f"{name}.json").read_bytes(), name)


def _parsed(text: bytes, where: str) -> Classes:
    content = json_of(text, where)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("classes", "palette")):
        raise ImageError(
            f'{where} must be JSON with the lists "classes" (names) and "palette" (a colour [r,g,b] each), got '
            f"{shown(reprlib.repr(content))}"
        )
    names = class_names(content["classes"], where)
    with reading(where, _CLASSES):
        return Classes(tuple(names), content["palette"])


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its images and masks, and what its labels mean.

    Args:
        images: folder of a split's images, with {split}.
        masks: folder of a split's masks, with {split}.
        ending: ending of an image's name; in the mask's name `mask_ending` replaces it.
        mask_ending: ending of a mask's name.
        splits: split -> folder name, for folders that are not named train, val or test.
        labels: value in a mask -> class or IGNORE; None if each value is its class or IGNORE.
    """

    images: str
    masks: str
    ending: str = ""
    mask_ending: str = ".png"
    splits: Mapping[str, str] | None = None
    labels: Mapping[int, int] | None = None


# the labels of Cityscapes that are scored, 19 of 34
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

LAYOUTS: dict[str, Layout] = {
    "masks": Layout("images/{split}", "annotations/{split}"),
    "ade20k": Layout(
        "images/{split}",
        "annotations/{split}",
        splits={"train": "training", "val": "validation"},
        # 0 marks pixels without a class
        labels={0: IGNORE, **{label: label - 1 for label in range(1, 151)}},
    ),
    "cityscapes": Layout(
        "leftImg8bit/{split}",
        "gtFine/{split}",
        "_leftImg8bit.png",
        "_gtFine_labelIds.png",
        # a licence plate has label -1, which masks store as 255
        labels={**dict.fromkeys([*range(34), 255], IGNORE), **{label: i for i, label in enumerate(_CITYSCAPES)}},
    ),
}


class Pairs:
    """Images and masks, paired by their names.

    Args:
        name: name of the layout: "ade20k" (ADEChallengeData2016), "cityscapes" (leftImg8bit and gtFine, original
            labels), or "masks" for images/{split}/NAME.jpg, annotations/{split}/NAME.png and classes.json.
        data: the folder, or a zip archive of it.
        split: "train", "val" or "test".

    Raises:
        ImageError: files are missing, or an image has no mask; the text names them. An item raises it if a file
            cannot be read, or if a mask has another size, other channels, or a label without a class.
    """

    def __init__(self, name: str, data: Path, split: str) -> None:
        layout = LAYOUTS[name]
        self._files = Files(data)
        if name == "masks":
            if "classes.json" not in self._files:
                raise ImageError(f'expected classes.json in {shown(data)}, with "classes" and "palette"')
            self.classes = _parsed(self._files.read("classes.json", limits.LIST), f"classes.json in {shown(data)}")
        else:
            self.classes = shipped_classes(name)
        folder = (layout.splits or {}).get(split, split)
        images, masks = layout.images.format(split=folder), layout.masks.format(split=folder)
        there = set(self._files.below(masks))
        self.names: list[tuple[str, str]] = []
        without = []
        for image in self._files.below(images):
            if not (image.endswith(layout.ending) if layout.ending else image.lower().endswith(_IMAGES)):
                continue
            stem = image.removesuffix(layout.ending) if layout.ending else image.rpartition(".")[0]
            mask = masks + stem.removeprefix(images) + layout.mask_ending
            self.names.append((image, mask))
            if mask not in there:
                without.append(mask)
        if not self.names:
            raise ImageError(
                f"expected images in {images}/ and masks in {masks}/ of {shown(data)}, but found no image; that is "
                f"the layout of {name!r}, others are {', '.join(other for other in LAYOUTS if other != name)}"
            )
        if without:
            raise ImageError(
                f"{len(without)} of the {len(self.names)} images in {images}/ of {shown(data)} have no mask: expected "
                f"{', '.join(map(brief, without[:3]))}{', ...' if len(without) > 3 else ''}"
            )
        self._labels = _table(layout.labels, len(self.classes.names))
        self._accepted = sorted(layout.labels or [*range(len(self.classes.names)), IGNORE])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        """The image in RGB and its mask `[H,W]`, uint8: the class of each pixel, or IGNORE."""
        image, mask = self.image(index), self._decoded(self.names[index][1], None)
        where = self._files.where(self.names[index][1])
        if mask.mode not in ("L", "P"):
            raise ImageError(f"{where} must have one channel of 8 bits with a label a pixel, got mode {mask.mode}")
        if mask.size != image.size:
            raise ImageError(f"{where} must be as large as its image, {image.size}, got {mask.size}")
        values = np.asarray(mask)
        labels = self._labels[values]
        if labels.min() < 0:
            wrong = sorted(set(np.unique(values[labels < 0]).tolist()))
            raise ImageError(
                f"{where} has labels that are no class: {', '.join(map(str, wrong[:5]))}; expected "
                f"{_ranges(self._accepted)}"
            )
        return image, torch.from_numpy(labels.astype(np.uint8))

    def image(self, index: int) -> Image.Image:
        """The image alone, in RGB."""
        return self._decoded(self.names[index][0], "RGB")

    def _decoded(self, name: str, mode: str | None) -> Image.Image:
        return decoded(io.BytesIO(self._files.read(name, limits.IMAGE)), self._files.where(name), mode)


def _table(labels: Mapping[int, int] | None, classes: int) -> Any:
    """For each of the 256 values in a mask: its class, IGNORE, or -1 if it has none. `[256]`, int16."""
    table = np.full(256, -1, np.int16)
    for value, label in (labels or {**{i: i for i in range(classes)}, IGNORE: IGNORE}).items():
        table[value] = label
    return table


def _ranges(values: Sequence[int]) -> str:
    """Sorted numbers as text, with runs shortened to "a to b"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return " and ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


class MaskSet(Dataset[Any]):
    """Images and masks, transformed together.

    Args:
        pairs: the images and their masks.
        transform: maps an image `[3,H,W]` and a mask `[H,W]`, both uint8, to the network's input and its target.

    An item is (image, mask).
    """

    def __init__(self, pairs: Pairs, transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.pairs, self.transform = pairs, transform
        self.classes = pairs.classes.names

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        return self.transform(pixels(image), mask)
