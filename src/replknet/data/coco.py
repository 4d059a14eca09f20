"""Images with boxes and masks of objects, in COCO's JSON format: COCO itself, and any data set in that format."""

import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from replknet.data.images import ImageError, decoded
from replknet.data.masks import Files

# annotations and images of a split: COCO's own names, then plain names
_LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
)
# pixels; larger than any coordinate of a real image
_FAR = 1e6


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
            raise ImageError(
                f"{data}: a part of {self._annotations} cannot be used: {'; '.join(map(str, self.problems))}; correct "
                'it, or leave it out with malformed="skip"'
            )
        kept = [id for id, image in images.items() if image is not None and (empty or objects[id])]
        if not kept:
            raise ImageError(f"{data}: {self._annotations} has no image that can be used; {len(images)} are listed")
        self.category_ids = tuple(categories)
        self.classes = tuple(category["name"] for category in categories.values())
        self.image_ids = tuple(kept)
        self._masks = masks
        self._names = [f"{folder}/{images[id]['file_name']}" for id in kept]  # type: ignore[index]  # not None
        # (height, width) of each image
        self.sizes = torch.tensor([images[id]["size"] for id in kept])  # type: ignore[index]
        self._pack([objects[id] for id in kept])

    def _images(
        self, entries: list[dict[str, Any]], folder: str, wrong: dict[str, list[int]]
    ) -> dict[int, dict[str, Any] | None]:
        """Id -> entry with its `size` (height, width), or None if the file is missing."""
        there = set(self._files.below(folder))
        images: dict[int, dict[str, Any] | None] = {}
        for id, entry in _unique(entries, "image", wrong).items():
            name = f"{folder}/{entry['file_name']}"
            if name not in there:
                wrong["image whose file is missing"].append(id)
                images[id] = None
                continue
            size = entry.get("height"), entry.get("width")
            if not all(isinstance(side, int) and side > 0 for side in size):
                size = self._read(name).size[::-1]
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
        given = [one["area"] if _number(one.get("area")) else None for one in all_]
        boxes = xywh[:, 2:].prod(1).tolist()
        self._area = torch.tensor([b if a is None else a for a, b in zip(given, boxes, strict=True)]).float()
        self._segmentations = _Texts(json.dumps(one["segmentation"]) for one in all_) if self._masks else None

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
            masks = np.zeros((end - first, height, width), np.uint8)
            for mask, i in zip(masks, range(first, end), strict=True):
                mask[:] = _mask(json.loads(self._segmentations[i]), height, width)
            targets["masks"] = torch.from_numpy(masks)
        return image, targets

    def image(self, index: int) -> Image.Image:
        """The image alone, in RGB."""
        return self._read(self._names[index])

    def _where(self, index: int) -> str:
        return f"{self._files.root}: {self._names[index]} (image {self.image_ids[index]})"

    def _read(self, name: str) -> Image.Image:
        try:
            content = self._files.read(name)
        except (OSError, zipfile.BadZipFile) as error:
            raise ImageError(f"{self._files.root}: {name} cannot be read: {error}") from error
        return decoded(io.BytesIO(content), f"{self._files.root}: {name}")


class _Texts:
    """Many texts in two arrays."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._end = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __getitem__(self, index: int) -> str:
        first = self._end[index - 1] if index else 0
        return self._bytes[first : self._end[index]].tobytes().decode()


def _places(files: Files, split: str) -> tuple[str, str]:
    """Names of the annotation file and of the image folder."""
    places = [(name.format(split=split), folder.format(split=split)) for name, folder in _LAYOUTS]
    for name, folder in places:
        if name in files:
            return name, folder
    there = [name for name in files.below("annotations") if name.endswith(".json")]
    raise ImageError(
        f"expected {' or '.join(name for name, _ in places)} in {files.root}, but found "
        f"{', '.join(there[:5]) or 'no JSON in annotations/'}"
    )


def _content(files: Files, name: str) -> dict[str, list[dict[str, Any]]]:
    where = f"{files.root}: {name}"
    try:
        content = json.loads(files.read(name))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{where} cannot be read as JSON: {error}") from error
    for key, needed in (("images", "file_name"), ("annotations", None), ("categories", "name")):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            got = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise ImageError(f'{where} must have lists "images", "annotations" and "categories", got {got}')
        for i, entry in enumerate(content[key]):
            fine = isinstance(entry, dict) and isinstance(entry.get("id"), int)
            if not fine or (needed is not None and not isinstance(entry.get(needed), str)):
                also = f' and a text "{needed}"' if needed else ""
                raise ImageError(f'{where}: {key}[{i}] must have a whole number "id"{also}, got {str(entry)[:80]}')
    return content


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
        if not isinstance(image_id, int) or image_id not in images:
            wrong["annotation of an image that is not listed"].append(id)
            continue
        image = images[image_id]
        # the missing file is reported already
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
    if not isinstance(category_id, int) or category_id not in categories:
        return "of a category that is not listed"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_number(value) for value in box)):
        return "without a box of four finite numbers"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "with a box without width or height"
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return "with a box outside its image"
    if not masks:
        return None
    if not annotation.get("segmentation"):
        return "without a segmentation"
    if not _is_segmentation(annotation["segmentation"], *size):
        return "with a segmentation that is neither polygons nor runs that fill its image"
    return None


def _number(value: Any) -> bool:
    # false for NaN, too
    return isinstance(value, (int, float)) and -_FAR < value < _FAR


def _is_segmentation(segmentation: Any, height: int, width: int) -> bool:
    if isinstance(segmentation, list):
        return all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_number, polygon))
            for polygon in segmentation
        )
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if not isinstance(counts, (str, list)):
        return False
    runs = _runs(counts) if isinstance(counts, str) else counts
    return all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == height * width


def _runs(counts: str) -> list[int]:
    """The run lengths in COCO's compressed code; empty if the text is not that code.

    Each character has 5 bits of a signed number, the lowest bits first. From the fourth run on, a number is the
    difference to the run two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else []


def _mask(segmentation: Any, height: int, width: int) -> Any:
    """Pixels of an object: a NumPy array `[H,W]`, uint8.

    We fill in the runs ourselves. If they do not fill the image, pycocotools reads and writes beyond its memory. Its
    decode also uses a feature that NumPy 2 deprecates.
    """
    if isinstance(segmentation, list):
        # pycocotools comes with an extra of the package; boxes alone do not need it
        from pycocotools import mask as api

        counts = api.merge(api.frPyObjects(segmentation, height, width))["counts"].decode()
    else:
        counts = segmentation["counts"]
    runs = _runs(counts) if isinstance(counts, str) else counts
    # runs go column by column; the first is outside the object
    return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(width, height).T
