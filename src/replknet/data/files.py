"""Files of a data set, in a folder or a zip archive, and the texts in them."""

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from replknet import limits
from replknet.data.images import ImageError
from replknet.reading import Kind, reading
from replknet.shown import shown

_FILE = Kind(ImageError, "a file of a data set", "put it there again")
_ARCHIVE = Kind(ImageError, "a zip archive", "pack it again with zip -r, without a password")
_MEMBER = Kind(ImageError, "a file in a zip archive", "pack the archive again with zip -r, without a password")
_TEXT = Kind(ImageError, "text in UTF-8", "save it again in UTF-8")
_JSON = Kind(ImageError, "JSON", "correct it, or export it again")
# bytes that a member may have, however few it takes in its archive
_SMALL = 1024**2
# letters of a name that an error quotes
_QUOTED = 150


class Files:
    """Names and contents of the files in a folder or a zip archive.

    Args:
        root: the folder or the archive.

    Raises:
        ImageError: it is neither, or the archive is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._archives: dict[int, zipfile.ZipFile] = {}
        self._names: dict[str, None] | None = None
        if root.is_dir():
            return
        if not zipfile.is_zipfile(root):
            raise ImageError(f"expected a folder or a zip archive of images and masks, but {shown(root)} is neither")
        with reading(root, _ARCHIVE):
            names = self._archive().namelist()
            limits.check(len(names), limits.FILES, "files in an archive")
            self._names = dict.fromkeys(name for name in names if not name.endswith("/"))

    def _archive(self) -> zipfile.ZipFile:
        # processes must not share a file's position
        if os.getpid() not in self._archives:
            self._archives[os.getpid()] = zipfile.ZipFile(self.root)
        return self._archives[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}

    def __contains__(self, name: str) -> bool:
        return name in self._names if self._names is not None else (self.root / name).is_file()

    def below(self, folder: str) -> list[str]:
        """Names of the files in a folder and its subfolders, sorted."""
        if self._names is not None:
            return sorted(name for name in self._names if name.startswith(f"{folder}/"))
        return sorted(p.relative_to(self.root).as_posix() for p in (self.root / folder).rglob("*") if p.is_file())

    def where(self, name: str) -> str:
        """What errors call a file."""
        return f"{shown(self.root)}: {brief(name)}"

    def read(self, name: str, most: float) -> bytes:
        """The content of a file.

        Args:
            name: one of the names.
            most: the limit of its size, bytes.

        Raises:
            ImageError: the file is missing, damaged, encrypted or larger. A file in an archive must also not be larger
                than `limits.INFLATION` times what it takes there.
        """
        with reading(self.where(name), _FILE if self._names is None else _MEMBER):
            if self._names is not None:
                return self._inflated(name, most)
            path = self.root / name
            if not path.is_file():
                raise ImageError(f"{self.where(name)} is no file")
            limits.check(path.stat().st_size, most, "bytes")
            return path.read_bytes()

    def _inflated(self, name: str, most: float) -> bytes:
        info = self._archive().getinfo(name)
        # zipfile inflates the other kinds without a bound
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ImageError(
                f"{self.where(name)} is compressed with method {info.compress_type}; expected 8, deflate: pack it "
                "again with zip -r"
            )
        # what the archive says of itself may be wrong
        packed = min(info.compress_size, self.root.stat().st_size)
        limits.check(info.file_size, min(most, limits.INFLATION * packed + _SMALL), "bytes when it is unpacked")
        with self._archive().open(name) as file:
            content = file.read(info.file_size)
        if len(content) != info.file_size:
            raise ImageError(f"{self.where(name)} ends after {len(content)} of {info.file_size} bytes; pack it again")
        return content


class Texts:
    """Many texts in two arrays: workers would copy a list page by page."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._end = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._end)

    def __getitem__(self, index: int) -> str:
        first = self._end[index - 1] if index else 0
        return os.fsdecode(self._bytes[first : self._end[index]].tobytes())


def text_of(content: bytes, where: str) -> str:
    """Bytes as text; errors call it `where`.

    Raises:
        ImageError: they are no UTF-8.
    """
    with reading(where, _TEXT):
        return content.decode("utf-8-sig")


def json_of(content: bytes, where: str) -> Any:
    """What a JSON text stands for; errors call it `where`.

    Raises:
        ImageError: it is no JSON, or no UTF-8.
    """
    text = text_of(content, where)
    with reading(where, _JSON):
        return json.loads(text)


def brief(name: str) -> str:
    """A name for an error, in one line and shortened."""
    text = shown(name[:_QUOTED])
    return text if len(name) <= _QUOTED else f"{text}..."
