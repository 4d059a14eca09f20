"""Image files and folders of classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

PHOTOS = tuple(sorted((Path(__file__).parent / "photos").glob("*.jpg")))


class ImageError(ValueError):
    """An image or a folder of images that cannot be used; the text names it and what was expected."""


def image_folder(root: Path, split: str, transform: Callable[[Any], Any]) -> ImageFolder:
    """`root/split/class/image.jpg`, the layout of torchvision's ImageFolder.

    Raises:
        ImageError: the folder is not there or has no classes with images.
    """
    folder = root / split
    if not folder.is_dir():
        raise ImageError(f"expected images in {folder}/<class>/, but there is no {folder}")
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise ImageError(f"expected images in {folder}/<class>/: {error}") from error


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
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def batch(paths: Sequence[Path], transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Images as one batch `[N,3,H,W]`."""
    return torch.stack([transform(read(path)) for path in paths])
