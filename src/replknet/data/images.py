"""Image files, and folders and archives of classes."""

import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

PHOTOS = tuple(sorted((Path(__file__).parent / "photos").glob("*.jpg")))


class ImageError(ValueError):
    """An image or a folder of images that cannot be used; the text names it and what was expected."""


class ImageSet(Dataset[Any]):
    """Images of classes in a folder or a tar archive, some of which may be unreadable.

    Args:
        source: `root/class/image.jpg`, or a tar archive with such paths.
        transform: from a PIL image in RGB to what the network gets.
        unreadable: images that may be unreadable. Each is named on stderr once, and skipped.
        replace: take the next image for one that is skipped, so that batches stay as large as they are; else the item
            is None, for `present`.

    An item is (image, label).

    Raises:
        ImageError: there are no classes with images; by an item: one image too many is unreadable.
    """

    def __init__(
        self, source: Path, transform: Callable[[Any], Any], unreadable: int = 0, replace: bool = False
    ) -> None:
        self.transform, self.unreadable, self.replace = transform, unreadable, replace
        self._reader = _Tar(source) if source.suffix == ".tar" else _Folder(source)
        self.classes: list[str] = self._reader.classes
        # one byte an image in memory that workers share, since each of them meets images of its own
        self._skipped = torch.zeros(len(self._reader), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def skipped(self) -> list[int]:
        """The images that were unreadable so far."""
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
    """Collate the items that were not skipped; None if all were."""
    items = [item for item in items if item is not None]
    return torch.utils.data.default_collate(items) if items else None


class _Folder:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ImageError(f"expected images in {folder}/<class>/ or {folder}.tar, but there is neither")
        try:
            self._images = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ImageError(f"expected images in {folder}/<class>/: {error}") from error
        self.classes = list(self._images.classes)

    def __len__(self) -> int:
        return len(self._images.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._images.samples[index]
        return read(Path(path)), label


class _Tar:
    """timm's reader of tar archives, with classes in the order of a folder's, and names in errors."""

    def __init__(self, archive: Path) -> None:
        try:
            # its default writes a pickle of the index beside large archives
            self._reader = ReaderImageInTar(str(archive), cache_tarinfo=False)
        except (tarfile.TarError, OSError, RuntimeError, AssertionError) as error:
            raise ImageError(f"expected a tar archive with <class>/<image> in {archive}: {error}") from error
        self._archive = archive
        theirs = self._reader.class_name_to_idx
        self.classes = sorted(theirs)
        self._labels = {theirs[name]: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._reader[index]
        return _decoded(file, f"{self._archive}:{self._reader.filename(index)}"), self._labels[label]


def split_of(root: Path, split: str) -> Path:
    """`root/split.tar` if it is there, else the folder `root/split`."""
    archive = root / f"{split}.tar"
    return archive if archive.is_file() else root / split


def files(paths: Sequence[Path]) -> list[Path]:
    """The image files among the paths, folders searched to the bottom, in a fixed order.

    Raises:
        ImageError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        elif path.is_file():
            found.append(path)
        else:
            raise ImageError(f"no image or folder at {path}")
    if not found:
        raise ImageError(f"no images in {', '.join(map(str, paths))}; known are {' '.join(IMG_EXTENSIONS)}")
    return found


def read(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        ImageError: the file is no image, or a damaged one.
    """
    return _decoded(path, str(path))


def _decoded(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        # Pillow's decoders of damaged files raise all of these
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def batch(paths: Sequence[Path], transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Images as one batch `[N,3,H,W]`."""
    return torch.stack([transform(read(path)) for path in paths])
