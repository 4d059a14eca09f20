"""Images with boxes and masks of objects, in COCO's JSON format: COCO itself, and any data set in that format."""

import io
import json
import reprlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from replknet import limits
from replknet.data import polygons
from replknet.data.files import Files, Texts, brief, json_of
from replknet.data.images import ImageError, class_names, decoded
from replknet.reading import Kind, reading
from replknet.shown import shown

# annotations and images of a split: COCO's own names, then plain names
_LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
)
_OBJECTS = Kind(ImageError, "an image with its objects", "leave it out")
# pixels; larger than any coordinate of a real image
_FAR = 1e6
# bits of a run length
_LONGEST = 60
# kinds of problems that an error names
_NAMED = 5


@cache
def shipped_classes() -> tuple[str, ...]:
    """The 80 classes of COCO in the order of their ids, as in the official weights."""
    return tuple(json.loads((Path(__file__).parent / "classes" / "coco.json").read_text())["classes"])


@dataclass(frozen=True)
class Problem:
    """Images, annotations or categories that cannot be used, all for one reason.

    Args:
        kind: what is wrong.
        ids: their ids in the JSON.
    """

    kind: str
    ids: tuple[int, ...]

    def __str__(self) -> str:
        first = ", ".join(map(str, self.ids[:5]))
        return f"{self.kind} ({len(self.ids)}): {first}{', ...' if len(self.ids) > 5 else ''}"


class CocoImages:
    """Images and their objects.

    Args:
        data: a folder, or a zip archive of it. It has `annotations/instances_SPLIT.json` and images in `SPLIT/`, or
            COCO's own names, such as `instances_train2017.json` and `train2017/`.
        split: "train", "val" or "test".
        masks: whether an item has a mask for each object.
        malformed: "error" refuses annotations, images and categories that cannot be used. "skip" leaves them out and
            lists them in `problems`. COCO's train2017 itself has one box without height.
        empty: whether to keep images without objects. Evaluation needs them; mmdetection trains without them.

    An item is the image in RGB and the targets of its n objects, in the order of the JSON:

    - `boxes` `[n,4]`, float32: (x1, y1, x2, y2) in pixels as annotated; some reach beyond the image;
    - `labels` `[n]`, int64: numbered from 0 in ascending order of the categories' ids;
    - `crowd` `[n]`, bool: the object stands for many;
    - `area` `[n]`, float32: the annotation's area, or the box's area if the annotation has none;
    - `masks` `[n,H,W]`, uint8, 0 or 1: only with `masks=True`.

    Raises:
        ImageError: files are missing, the JSON has another structure, or entries in it cannot be used. The text counts
            and names them. An item raises it if its image cannot be read or has another size than in the JSON.
    """

    def __init__(
        self,
        data: Path,
        split: str,
        *,
        masks: bool = False,
        malformed: Literal["error", "skip"] = "error",
        empty: bool = True,
    ) -> None:
        self._files = Files(data)
        self._annotations, folder = _places(self._files, split)
        content = _content(self._files, self._annotations)
        wrong: dict[str, list[int]] = defaultdict(list)
        categories = dict(sorted(_unique(content["categories"], "category", wrong).items()))
        images = self._images(content["images"], folder, wrong)
        objects = _objects(_unique(content["annotations"], "annotation", wrong), images, set(categories), masks, wrong)
        self.problems = tuple(Problem(kind, tuple(ids)) for kind, ids in wrong.items())
        if self.problems and malformed == "error":
            more = f"; and {len(self.problems) - _NAMED} other kinds" if len(self.problems) > _NAMED else ""
            raise ImageError(
                f"{shown(data)}: a part of {self._annotations} cannot be used: "
                f"{'; '.join(map(str, self.problems[:_NAMED]))}{more}; correct it, or leave it out with "
                'malformed="skip"'
            )
        kept = [id for id, image in images.items() if image is not None and (empty or objects[id])]
        if not kept:
            raise ImageError(
                f"{shown(data)}: {self._annotations} has no image that can be used; {len(images)} are listed"
            )
        self.category_ids = tuple(categories)
        where = self._files.where(self._annotations)
        self.classes = tuple(class_names([category["name"] for category in categories.values()], where))
        self.image_ids = tuple(kept)
        self._masks = masks
        self._names = [f"{folder}/{images[id]['file_name']}" for id in kept]  # type: ignore[index]  # not None
        # (height, width) of each image
        self.sizes = torch.tensor([images[id]["size"] for id in kept])  # type: ignore[index]
        self._pack([objects[id] for id in kept])

    def _images(
        self, entries: list[dict[str, Any]], folder: str, wrong: dict[str, list[int]]
    ) -> dict[int, dict[str, Any] | None]:
        """Id -> entry with its `size` (height, width), or None if it cannot be used."""
        there = set(self._files.below(folder))
        images: dict[int, dict[str, Any] | None] = {}
        for id, entry in _unique(entries, "image", wrong).items():
            name = f"{folder}/{entry['file_name']}"
            if name not in there:
                wrong["image whose file is missing"].append(id)
                images[id] = None
                continue
            size: Any = entry.get("height"), entry.get("width")
            if not all(_whole(side) and side > 0 for side in size):
                size = self._read(name).size[::-1]
            if size[0] * size[1] > limits.PIXELS * limits.factor():
                wrong[f"image of more pixels than {limits.VARIABLE} allows"].append(id)
                images[id] = None
                continue
            images[id] = {**entry, "size": size}
        return images

    def _pack(self, objects: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Store the objects in a few arrays: workers would copy many small Python objects page by page."""
        self._first = torch.tensor([0, *(len(some) for some in objects)]).cumsum(0)
        all_ = [one for some in objects for one in some]
        category = {id: label for label, id in enumerate(self.category_ids)}
        xywh = torch.tensor([one["bbox"] for one in all_], dtype=torch.float64).reshape(-1, 4)
        self._boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).float()
        self._labels = torch.tensor([category[one["category_id"]] for one in all_], dtype=torch.int64)
        self._crowd = torch.tensor([bool(one.get("iscrowd", 0)) for one in all_], dtype=torch.bool)
        given = [one["area"] if _number(one.get("area"), _FAR**2) else None for one in all_]
        boxes = xywh[:, 2:].prod(1).tolist()
        self._area = torch.tensor([b if a is None else a for a, b in zip(given, boxes, strict=True)]).float()
        self._segmentations = Texts(json.dumps(one["segmentation"]) for one in all_) if self._masks else None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        image = self.image(index)
        height, width = self.sizes[index].tolist()
        if image.size != (width, height):
            raise ImageError(
                f"{self._where(index)} must be of the size in {self._annotations}, {width}x{height}, got "
                f"{image.width}x{image.height}; correct the entry, or delete it"
            )
        first, end = self._first[index : index + 2].tolist()
        targets = {
            "boxes": self._boxes[first:end].clone(),
            "labels": self._labels[first:end].clone(),
            "crowd": self._crowd[first:end].clone(),
            "area": self._area[first:end].clone(),
        }
        if self._segmentations is not None:
            with reading(self._where(index), _OBJECTS):
                found = [json.loads(self._segmentations[i]) for i in range(first, end)]
                targets["masks"] = torch.from_numpy(_masks(found, height, width))
        return image, targets

    def image(self, index: int) -> Image.Image:
        """The image alone, in RGB."""
        return self._read(self._names[index])

    def _where(self, index: int) -> str:
        return f"{self._files.where(self._names[index])} (image {self.image_ids[index]})"

    def _read(self, name: str) -> Image.Image:
        return decoded(io.BytesIO(self._files.read(name, limits.IMAGE)), self._files.where(name))


def _places(files: Files, split: str) -> tuple[str, str]:
    """Names of the annotation file and of the image folder."""
    places = [(name.format(split=split), folder.format(split=split)) for name, folder in _LAYOUTS]
    for name, folder in places:
        if name in files:
            return name, folder
    there = [name for name in files.below("annotations") if name.endswith(".json")]
    raise ImageError(
        f"expected {' or '.join(name for name, _ in places)} in {shown(files.root)}, but found "
        f"{', '.join(map(brief, there[:5])) or 'no JSON in annotations/'}"
    )


def _content(files: Files, name: str) -> dict[str, list[dict[str, Any]]]:
    where = files.where(name)
    content = json_of(files.read(name, limits.TEXT), where)
    for key, needed in (("images", "file_name"), ("annotations", None), ("categories", "name")):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            got = _short(list(content)) if isinstance(content, dict) else type(content).__name__
            raise ImageError(f'{where} must have lists "images", "annotations" and "categories", got {got}')
        for i, entry in enumerate(content[key]):
            fine = isinstance(entry, dict) and _whole(entry.get("id"))
            if not fine or (needed is not None and not isinstance(entry.get(needed), str)):
                also = f' and a text "{needed}"' if needed else ""
                raise ImageError(f'{where}: {key}[{i}] must have a whole number "id"{also}, got {_short(entry)}')
    return content


def _short(value: object) -> str:
    """A value from a file, for an error."""
    return shown(reprlib.repr(value))


def _unique(entries: list[dict[str, Any]], what: str, wrong: dict[str, list[int]]) -> dict[int, dict[str, Any]]:
    """Entries by id; if several share an id, the first."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if entry["id"] in found:
            wrong[f"{what} with the id of another"].append(entry["id"])
        else:
            found[entry["id"]] = entry
    return found


def _objects(
    annotations: dict[int, dict[str, Any]],
    images: dict[int, dict[str, Any] | None],
    categories: set[int],
    masks: bool,
    wrong: dict[str, list[int]],
) -> dict[int, list[dict[str, Any]]]:
    """Annotations that can be used, by the id of their image."""
    found: dict[int, list[dict[str, Any]]] = {id: [] for id in images}
    for id, annotation in annotations.items():
        image_id = annotation.get("image_id")
        if not _whole(image_id) or image_id not in images:
            wrong["annotation of an image that is not listed"].append(id)
            continue
        image = images[image_id]
        # the image is reported already
        if image is None:
            continue
        kind = _refusal(annotation, image["size"], categories, masks)
        if kind is None:
            found[image_id].append(annotation)
        else:
            wrong[f"annotation {kind}"].append(id)
    return found


def _refusal(annotation: dict[str, Any], size: tuple[int, int], categories: set[int], masks: bool) -> str | None:
    """Why an annotation cannot be used; None if it can."""
    category_id = annotation.get("category_id")
    if not _whole(category_id) or category_id not in categories:
        return "of a category that is not listed"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_number(value) for value in box)):
        return "without a box of four finite numbers"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "with a box without width or height"
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return "with a box outside its image"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return 'with an "iscrowd" that is neither 0 nor 1'
    if not masks:
        return None
    if not annotation.get("segmentation"):
        return "without a segmentation"
    if not _is_segmentation(annotation["segmentation"], *size):
        return "with a segmentation that is neither polygons nor runs that fill its image"
    return None


def _whole(value: Any) -> bool:
    """Whether it is a number that 64 bits hold; Python takes true for 1."""
    return type(value) is int and -(2**63) <= value < 2**63


def _number(value: Any, far: float = _FAR) -> bool:
    # false for NaN, too
    return type(value) in (int, float) and -far < value < far


def _is_segmentation(segmentation: Any, height: int, width: int) -> bool:
    if isinstance(segmentation, list):
        return all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_number, polygon))
            for polygon in segmentation
        )
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    if not isinstance(segmentation.get("counts"), (str, list)):
        return False
    runs = _counts(segmentation)
    return all(_whole(run) and run >= 0 for run in runs) and sum(runs) == height * width


def _counts(segmentation: dict[str, Any]) -> list[int]:
    counts = segmentation["counts"]
    return _runs(counts) if isinstance(counts, str) else counts


def _runs(counts: str) -> list[int]:
    """The run lengths in COCO's compressed code; empty if the text is not that code.

    Each character has 5 bits of a signed number, the lowest bits first. From the fourth run on, a number is the
    difference to the run two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > _LONGEST:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else []


def _masks(segmentations: Sequence[Any], height: int, width: int) -> Any:
    """Pixels of the objects of an image: a NumPy array `[n,H,W]`, uint8.

    pycocotools reads and writes beyond its memory where runs do not fill the image, and where polygons reach far
    outside. We fill in runs and polygons ourselves.
    """
    limits.check(len(segmentations) * height * width, limits.MASK_PIXELS, "pixels in the masks of an image")
    found = [polygons.edges(one) if isinstance(one, list) else _counts(one) for one in segmentations]
    crossed = sum(polygons.crossings(one, width) for one in found if isinstance(one, polygons.Edges))
    limits.check(crossed, limits.CROSSINGS, "columns crossed by the edges of an image's polygons")
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, one in zip(masks, found, strict=True):
        runs: Any = polygons.runs(one, height, width) if isinstance(one, polygons.Edges) else one
        # runs go column by column; the first is outside the object
        inside = (np.arange(len(runs)) % 2).astype(np.uint8)
        mask[:] = np.repeat(inside, runs).reshape(width, height).T
    return masks
