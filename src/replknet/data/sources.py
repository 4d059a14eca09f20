"""Data sets of classes in folders, in archives and on the Hugging Face hub."""

from pathlib import Path

import timm  # noqa: F401  # first as a whole, as in replknet.models
from PIL import Image
from torchvision.datasets import ImageFolder

from replknet.data.files import brief
from replknet.data.images import ImageError, Source, class_names, decoded, read
from replknet.data.tars import Shards, Tar
from replknet.reading import Kind, reading, told
from replknet.shown import shown

_HUB = Kind(ImageError, "a data set of the Hugging Face hub", "check its name, and that the hub can be reached")
_ITEM = Kind(ImageError, "an image of a data set of the Hugging Face hub", "leave it out")


class _Folder:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            path = shown(folder)
            raise ImageError(f"expected images in {path}/<class>/ or {path}.tar, but there is neither")
        try:
            self._images = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ImageError(f"expected images in {shown(folder)}/<class>/: {told(error)}") from error
        self.classes = class_names(self._images.classes, str(folder))

    def __len__(self) -> int:
        return len(self._images.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._images.samples[index]
        return read(Path(path)), label


class _Hub:
    """A data set of the Hugging Face hub, read by timm; it needs the package `datasets`."""

    def __init__(self, name: str, split: str) -> None:
        self._name = f"hfds/{name}"
        try:
            from datasets import get_dataset_split_names
            from timm.data.readers.reader_hfds import ReaderHfds
        except ModuleNotFoundError as error:
            raise ImageError(f"{shown(self._name)} needs one more package: pip install datasets ({error})") from error
        wanted = ("validation", "val", "test") if split == "val" else (split,)
        with reading(self._name, _HUB):
            there = get_dataset_split_names(name)
            found = next((one for one in wanted if one in there), None)
            if found is None:
                splits = brief(", ".join(there))
                raise ImageError(f"{shown(self._name)} has no split {' or '.join(wanted)}, but {splits}")
            self._reader = ReaderHfds(name, split=found)
            labels = self._reader.class_to_idx
        self._name = f"{self._name}:{found}"
        if not labels:
            raise ImageError(f"hfds/{shown(name)} has no labels with names")
        self.classes = class_names(sorted(labels, key=labels.__getitem__), self._name)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = f"image {index} of {self._name}"
        with reading(where, _ITEM):
            file, label = self._reader[index]
        return decoded(file, where), label


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
        return Tar(archive)
    shards = sorted(path for path in (root / split).glob("*.tar") if path.is_file())
    return Shards(root / split, shards) if shards else _Folder(root / split)
