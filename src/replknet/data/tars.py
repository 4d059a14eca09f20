"""Tar archives with random access: images with their class in the path, and shards of webdataset.

The loaders of timm, torch and webdataset scan or stream archives. We index all headers first, so that we choose the
order of images on any number of processes, and a training can resume in it exactly.
"""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import timm  # noqa: F401  # first as a whole, as in replknet.models
import torch
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from replknet import limits
from replknet.data.files import Texts, brief, text_of
from replknet.data.images import ImageError, class_names, decoded
from replknet.reading import Kind, reading
from replknet.shown import shown

_WAY_OUT = "pack it again with tar -cf, without compression, and with --dereference --hard-dereference for links"
_TAR = Kind(ImageError, "a tar archive of <class>/<image>", _WAY_OUT)
_SHARD = Kind(ImageError, "a shard of webdataset", _WAY_OUT)
_LIST = Kind(ImageError, "a list of classes", "save it again as text, with one name a line")
# bytes of the number of a class, with spaces
_DIGITS = 40
# endings of the images in a class's folder: timm's, so that labels and order stay as they were
_ENDINGS = (".png", ".jpg", ".jpeg")
# headers that describe the next member: Python reads them whole
_EXTRA = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _Header(tarfile.TarInfo):
    """A header that is checked before Python follows it: it takes quadratic time for long ones."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTRA:
            limits.check(header.size, limits.HEADER, "bytes in a header")
        return header


@dataclass(frozen=True)
class Member:
    """A file in a tar archive.

    Args:
        archive: name of its archive without the ending, if that lies in the outer archive; else empty.
        folder: its folder there.
        name: its own name.
        start: the first of its bytes in the outer archive.
        size: number of its bytes.
    """

    archive: str
    folder: str
    name: str
    start: int
    size: int

    @property
    def path(self) -> str:
        return posixpath.join(self.archive, self.folder, self.name)


def members(file: IO[bytes], endings: tuple[str, ...], nested: bool = False) -> Iterator[Member]:
    """The files in an archive that have one of the endings, in their order there.

    Args:
        file: the archive, open for reading bytes.
        endings: such as ".png", in lower case. The ending of a name begins at its last dot.
        nested: whether to look into archives inside it, and to give their files first.

    Raises:
        tarfile.TarError, ValueError: the archive is damaged, or a file is a link, has holes, or does not lie inside of
            the archive.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    own = []
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (header := tar.next()) is not None:
            # else it keeps all headers
            tar.members.clear()  # type: ignore[attr-defined]  # it has had this list for 20 years
            # each of them is applied to each file
            limits.check(len(tar.pax_headers), limits.RECORDS, "records for all files")
            # Python goes backwards, and round and round, where a size is negative
            if header.size < 0 or (header.isreg() and header.offset_data + header.size > end):
                raise tarfile.ReadError(f"{brief(header.name)} of {header.size} bytes does not lie inside of it")
            folder, _, name = header.name.rpartition("/")
            stem, ending = posixpath.splitext(name)
            inner = nested and ending.lower() == ".tar"
            if header.isdir() or not (inner or ending.lower() in endings):
                continue
            if not header.isreg() or header.issparse():
                raise tarfile.ReadError(f"{brief(header.name)} is a link or has holes, and must be a plain file")
            if not inner:
                own.append(Member("", folder, name, header.offset_data, header.size))
                continue
            part = tar.extractfile(header)
            assert part is not None
            for member in members(part, endings):
                yield replace(member, archive=stem, start=header.offset_data + member.start)
    yield from own


class Tar:
    """Images in a tar archive, with the name of their folder as their class.

    Args:
        archive: the archive. Archives inside it are folders, too.

    Raises:
        ImageError: the archive is damaged, or it has no images in folders.
    """

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        with reading(archive, _TAR), archive.open("rb") as file:
            # in the order that timm's reader has, since a training may go on that began with it
            found = sorted(members(file, _ENDINGS, nested=True), key=_order)
        names = [posixpath.join(m.archive, m.folder).strip("/").rpartition("/")[2] for m in found]
        if not all(name.strip(".") for name in names) or not names:
            what = "an image outside of a folder" if names else "no image"
            raise ImageError(f"{shown(archive)} has {what}; expected <class>/<image> with {' or '.join(_ENDINGS)}")
        classes = sorted(set(names))
        label = {name: i for i, name in enumerate(classes)}
        self.classes = class_names(classes, str(archive))
        self._names = Texts(member.path for member in found)
        # columns: start, bytes, label; a tensor, since workers would copy a list page by page
        self._index = torch.tensor([(m.start, m.size, label[name]) for m, name in zip(found, names, strict=True)])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        start, size, label = self._index[index].tolist()
        return _image(self._archive, start, size, f"{self._archive}:{self._names[index]}"), label


class Shards:
    """webdataset shards with random access.

    Args:
        folder: may have classes.txt with the names of the classes, one a line.
        shards: the archives. Each has KEY.jpg, or another image, beside KEY.cls with the number of its class.

    Raises:
        ImageError: a shard is damaged, or an image has no class.
    """

    def __init__(self, folder: Path, shards: list[Path]) -> None:
        self._shards = shards
        found: list[tuple[int, int, int, int]] = []
        for number, shard in enumerate(shards):
            with reading(shard, _SHARD), shard.open("rb") as file:
                found += [(number, *place) for place in _samples(shard, file)]
        if not found:
            raise ImageError(f"the shards in {shown(folder)} have no KEY.jpg with a KEY.cls beside it")
        # columns: shard, start, bytes, label
        self._index = torch.tensor(found)
        count = int(self._index[:, 3].max()) + 1
        self.classes = _classes(folder / "classes.txt", count)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        shard, start, size, label = self._index[index].tolist()
        archive = self._shards[shard]
        return _image(archive, start, size, f"image {index} ({archive} at byte {start})"), label


def _order(member: Member) -> list[int | str]:
    key: list[int | str] = natural_key(posixpath.join(member.folder, member.name))
    return key


def _image(archive: Path, start: int, size: int, name: str) -> Image.Image:
    with archive.open("rb") as file:
        file.seek(start)
        content = io.BytesIO(file.read(size))
    return decoded(content, name)


def _samples(shard: Path, file: IO[bytes]) -> Iterator[tuple[int, int, int]]:
    """Start, bytes and label of each image of a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}
    for member in members(file, (*IMG_EXTENSIONS, ".cls")):
        # the key is everything before the first dot of the file's name
        key, _, kind = member.name.partition(".")
        key = f"{member.folder}/{key}"
        if f".{kind.lower()}" in IMG_EXTENSIONS:
            images[key] = member.start, member.size
        elif kind == "cls":
            labels[key] = member.start, member.size
    for key, place in images.items():
        if key not in labels:
            raise ImageError(f"{shown(shard)} has an image {brief(key.lstrip('/'))} without a .cls beside it")
        yield *place, _label(shard, file, f"{key}.cls".lstrip("/"), *labels[key])


def _label(shard: Path, file: IO[bytes], name: str, start: int, size: int) -> int:
    file.seek(start)
    text = file.read(min(size, _DIGITS + 1)).strip()
    if not text.isdigit() or size > _DIGITS:
        raise ImageError(f"{shown(shard)} has {text[:20]!r} in {brief(name)}; expected the number of a class")
    limits.check(int(text) + 1, limits.CLASSES, f"classes in {brief(name)}")
    return int(text)


def _classes(file: Path, count: int) -> list[str]:
    """The names of the classes in a file, one a line; the numbers up to `count` if there is no file."""
    if not file.is_file():
        return [str(i) for i in range(count)]
    with reading(file, _LIST):
        limits.check(file.stat().st_size, limits.LIST, "bytes")
        content = file.read_bytes()
    names = text_of(content, str(file)).removesuffix("\n").split("\n")
    if len(names) < count:
        raise ImageError(f"{shown(file)} names {len(names)} classes, and the shards have a class {count - 1}")
    return class_names([name.removesuffix("\r") for name in names], str(file))
