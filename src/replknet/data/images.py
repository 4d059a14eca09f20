"""Image files, and data sets of classes in folders, archives and on the Hugging Face hub."""

import io
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm  # noqa: F401  # first as a whole, as in replknet.models
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

PHOTOS = tuple(sorted((Path(__file__).parent / "photos").glob("*.jpg")))


class ImageError(ValueError):
    """An image or a folder of images cannot be used. The text names it and says what was expected."""


class Source(Protocol):
    """Images with a label each; only an item that is read is decoded."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ImageSet(Dataset[Any]):
    """Images with class labels; some images may be unreadable.

    Args:
        source: the images, from `source_of`.
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
    """timm's reader of tar archives, with classes ordered as in a folder, and errors that name the image."""

    def __init__(self, archive: Path) -> None:
        try:
            # timm's default writes a pickle of the index beside large archives
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
        return decoded(file, f"{self._archive}:{self._reader.filename(index)}"), self._labels[label]


class _Shards:
    """webdataset shards with random access, so that we choose the order of images on any number of processes.

    The loaders of torch and webdataset stream shards. Their order depends on the workers, and no training can resume
    in it exactly. We index all headers first.
    """

    def __init__(self, folder: Path, shards: list[Path]) -> None:
        self._shards = shards
        found: list[tuple[int, int, int, int]] = []
        for number, shard in enumerate(shards):
            try:
                with tarfile.open(shard) as tar:
                    found += [(number, *place) for place in _samples(shard, tar)]
            except (tarfile.TarError, OSError) as error:
                raise ImageError(f"{shard} cannot be read as a shard of webdataset: {error}") from error
        if not found:
            raise ImageError(f"the shards in {folder} have no KEY.jpg with a KEY.cls beside it")
        # columns: shard, start, bytes, label; a tensor, since workers would copy a list page by page
        self._index = torch.tensor(found)
        names = folder / "classes.txt"
        count = int(self._index[:, 3].max()) + 1
        self.classes = names.read_text().splitlines() if names.is_file() else [str(i) for i in range(count)]
        if len(self.classes) < count:
            raise ImageError(f"{names} names {len(self.classes)} classes, and the shards have a class {count - 1}")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        shard, start, size, label = self._index[index].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read(size))
        return decoded(content, f"image {index} ({self._shards[shard]} at byte {start})"), label


def _samples(shard: Path, tar: tarfile.TarFile) -> Iterator[tuple[int, int, int]]:
    """Start, bytes and label of each image of a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for member in tar:
        # the key is everything before the first dot of the file's name
        key, _, kind = member.name.rpartition("/")[2].partition(".")
        key = f"{member.name.rpartition('/')[0]}/{key}"
        if f".{kind.lower()}" in IMG_EXTENSIONS:
            images[key] = member.offset_data, member.size
        elif kind == "cls":
            content = tar.extractfile(member)
            text = b"" if content is None else content.read().strip()
            if not text.isdigit():
                raise ImageError(f"{shard} has {text[:20]!r} in {member.name}; expected the number of a class")
            labels[key] = int(text)
    for key, place in images.items():
        if key not in labels:
            raise ImageError(f"{shard} has an image {key.lstrip('/')} without a .cls beside it")
        yield *place, labels[key]


class _Hub:
    """A data set of the Hugging Face hub, read by timm; it needs the package `datasets`."""

    def __init__(self, name: str, split: str) -> None:
        try:
            from datasets import get_dataset_split_names
            from timm.data.readers.reader_hfds import ReaderHfds
        except ModuleNotFoundError as error:
            raise ImageError(f"hfds/{name} needs one more package: pip install datasets ({error})") from error
        wanted = ("validation", "val", "test") if split == "val" else (split,)
        there = get_dataset_split_names(name)
        found = next((one for one in wanted if one in there), None)
        if found is None:
            raise ImageError(f"hfds/{name} has no split {' or '.join(wanted)}, but {', '.join(there)}")
        self._reader = ReaderHfds(name, split=found)
        self._name = f"hfds/{name}:{found}"
        labels = self._reader.class_to_idx
        if not labels:
            raise ImageError(f"hfds/{name} has no labels with names")
        self.classes = sorted(labels, key=labels.__getitem__)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._reader[index]
        return decoded(file, f"image {index} of {self._name}"), label


def source_of(root: Path, split: str) -> Source:
    """The images of a split.

    Args:
        root: a folder, or `hfds/NAME` for a data set of the Hugging Face hub. The folder has one of three layouts:
            `SPLIT/CLASS/IMAGE`; `SPLIT.tar` with paths `CLASS/IMAGE`; webdataset shards `SPLIT/*.tar`. A shard has
            `KEY.jpg` beside `KEY.cls`, a class number. Lines of an optional `SPLIT/classes.txt` name the classes.
        split: "train" or "val"; on the hub, "val" may also be called validation or test.

    Raises:
        ImageError: there are no such images.
    """
    if root.parts[:1] == ("hfds",):
        return _Hub("/".join(root.parts[1:]), split)
    archive = root / f"{split}.tar"
    if archive.is_file():
        return _Tar(archive)
    shards = sorted((root / split).glob("*.tar"))
    return _Shards(root / split, shards) if shards else _Folder(root / split)


def files(paths: Sequence[Path]) -> list[Path]:
    """The image files at the paths and in all their subfolders, in a fixed order.

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
        raise ImageError(f"no images in {', '.join(map(str, paths))}; known endings are {' '.join(IMG_EXTENSIONS)}")
    return found


def read(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        ImageError: the file is no image, or it is damaged.
    """
    return decoded(path, str(path))


def decoded(file: Any, name: str) -> Image.Image:
    """An image in RGB from a path or an open file; errors call it `name`."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        # on damaged files, Pillow's decoders raise all of these
        raise ImageError(f"{name} cannot be read as an image: {error}") from error


def pixels(image: Image.Image) -> torch.Tensor:
    """An image in RGB as a tensor `[3,H,W]`, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batch(paths: Sequence[Path], transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Images as one batch `[N,3,H,W]`."""
    return torch.stack([transform(read(path)) for path in paths])
