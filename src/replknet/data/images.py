"""Image files: the one place that decodes them, and data sets of images with a class each."""

import math
import re
import reprlib
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from replknet import limits
from replknet.reading import Kind, reading
from replknet.shown import shown

PHOTOS = tuple(sorted((Path(__file__).parent / "photos").glob("*.jpg")))
# Pillow's names of what we read, whatever the file's ending; JPEG includes MPO. For PostScript Pillow would start a
# program
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# Unicode's categories: control characters, separators of lines, and Python's stand-ins for bytes that are no UTF-8
_CONTROLS = {"Cc", "Zl", "Zp", "Cs"}


class ImageError(ValueError):
    """An image or a folder of images cannot be used. The text names it and says what was expected."""


_IMAGE = Kind(ImageError, "an image", "save it again as JPEG or PNG, or leave it out")
_NAMES = Kind(ImageError, "names of classes", "correct it")


class Source(Protocol):
    """Images with a label each; only an item that is read is decoded."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ImageSet(Dataset[Any]):
    """Images with class labels; some images may be unreadable.

    Args:
        source: the images, from `replknet.data.sources.source_of`.
        transform: maps a PIL image in RGB to the network's input.
        unreadable: how many images may be unreadable. Each of them is named on stderr once, and skipped.
        replace: take the next image instead of a skipped one, so that batches keep their size. If False, the item is
            None, and `present` drops it.

    An item is (image, label).

    Raises:
        ImageError: raised by an item: more than `unreadable` images are unreadable, or all are.
    """

    def __init__(
        self, source: Source, transform: Callable[[Any], Any], unreadable: int = 0, replace: bool = False
    ) -> None:
        self.transform, self.unreadable, self.replace = transform, unreadable, replace
        self._reader = source
        self.classes = source.classes
        # one byte an image, in shared memory, since each worker reads other images
        self._skipped = torch.zeros(len(self._reader), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def skipped(self) -> list[int]:
        """Indices of the images that were unreadable so far."""
        return self._skipped.nonzero()[:, 0].tolist()

    def __getitem__(self, index: int) -> Any:
        while True:
            try:
                image, label = self._reader[index]
            except ImageError as error:
                self._skip(index, error)
                if not self.replace:
                    return None
                index = (index + 1) % len(self)
                continue
            return self.transform(image), label

    def _skip(self, index: int, error: ImageError) -> None:
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        count = int(self._skipped.count_nonzero())
        if count > self.unreadable or count == len(self):
            raise ImageError(
                f"{error}; that is image {count} that cannot be read, and {self.unreadable} may be skipped "
                "(--unreadable-images)"
            )
        print(f"skipped {count} of at most {self.unreadable}: {error}", file=sys.stderr, flush=True)


def present(items: list[Any]) -> Any:
    """Collate the items that were not skipped; None if all were skipped."""
    items = [item for item in items if item is not None]
    return torch.utils.data.default_collate(items) if items else None


def files(paths: Sequence[Path]) -> list[Path]:
    """The image files at the paths and in all their subfolders, in a fixed order.

    Raises:
        ImageError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f"no image or folder at {shown(path)}")
    if not found:
        names = ", ".join(map(shown, paths[:3])) + (", ..." if len(paths) > 3 else "")
        raise ImageError(f"no images in {names}; known endings are {' '.join(IMG_EXTENSIONS)}")
    return found


def read(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        ImageError: there is no such file, it is no image, it is damaged, or it asks for more pixels than
            `limits.PIXELS`.
    """
    # opening a named pipe would wait for ever
    if not path.is_file():
        raise ImageError(f"{shown(path)} is no file; expected an image")
    return decoded(path, str(path))


def decoded(file: Any, name: str, mode: str | None = "RGB") -> Image.Image:
    """An image from a path or an open file: the one place that decodes images of users.

    Args:
        file: path, or file open for reading bytes. Only the first picture of an animation is read.
        name: what errors call it.
        mode: Pillow's name of the channels to convert to; None for those of the file.

    Raises:
        ImageError: the file is no image of `FORMATS`, it is damaged, or it asks for more pixels than `limits.PIXELS`.
    """
    allowed = limits.PIXELS * limits.factor()
    if Image.MAX_IMAGE_PIXELS is not None and allowed > Image.MAX_IMAGE_PIXELS:
        # the user allows more than Pillow does
        Image.MAX_IMAGE_PIXELS = int(allowed)
    with reading(name, _IMAGE), warnings.catch_warnings():
        # Pillow's warnings do not name the file; an image that it warns of is used, or an error says why not
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            count = re.search(r"\d+", str(error))
            limits.check(int(count[0]) if count else math.inf, limits.PIXELS, "pixels in an image")
            raise
        except UnidentifiedImageError as error:
            raise ValueError(f"its header is not of {', '.join(FORMATS)}, or it is damaged") from error
        with image:
            limits.check(image.width * image.height, limits.PIXELS, "pixels in an image")
            image.load()
            # convert would copy it
            return image if mode in (None, image.mode) else image.convert(mode)


def class_names(found: Sequence[object], where: str) -> list[str]:
    """Names of classes from a file or from folders, as a network may keep them.

    Args:
        found: the names.
        where: the file or folder, for errors.

    Returns:
        The names. Control characters, and bytes that are no UTF-8, are replaced by escapes such as `\\x1b`.

    Raises:
        ImageError: a name is no text, or it is longer than `limits.NAME`, or there are more than `limits.CLASSES`.
    """
    with reading(where, _NAMES):
        limits.check(len(found), limits.CLASSES, "classes")
        names = []
        for name in found:
            if not isinstance(name, str):
                raise ImageError(f"{shown(where)} must name each class by a text, got {shown(reprlib.repr(name))}")
            limits.check(len(name), limits.NAME, "letters in the name of a class")
            clean = _CONTROLS.isdisjoint(map(unicodedata.category, name))
            names.append(name if clean else shown(name))
    return names


def pixels(image: Image.Image) -> torch.Tensor:
    """An image in RGB as a tensor `[3,H,W]`, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batch(paths: Sequence[Path], transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Images as one batch `[N,3,H,W]`."""
    return torch.stack([transform(read(path)) for path in paths])
