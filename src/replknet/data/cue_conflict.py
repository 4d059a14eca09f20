"""Images with the shape of one category and the texture of another, as in the files of Geirhos et al. 2019.

The published files are `style-transfer-preprocessed-512/<shape>/<shape><n>-<texture><m>.png` in the repository
rgeirhos/texture-vs-shape: 1280 images of 16 categories, 1200 of them with a conflict. The file names say everything;
folders may be left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from replknet.data import images
from replknet.data.images import ImageError
from replknet.shown import shown

_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+")


@dataclass(frozen=True)
class CueConflict:
    """One image file.

    Args:
        file: the image.
        shape: index of its shape's category.
        texture: index of its texture's category.
    """

    file: Path
    shape: int
    texture: int


class CueConflicts(Dataset[Any]):
    """Images with conflicting cues; an item is a transformed image.

    Args:
        found: what `cue_conflicts` returns.
        transform: maps a PIL image in RGB to the network's input.
    """

    def __init__(self, found: Sequence[CueConflict], transform: Callable[[Any], Any]) -> None:
        self.found, self.transform = found, transform

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> Any:
        return self.transform(images.read(self.found[index].file))


def cue_conflicts(folder: Path, categories: Sequence[str]) -> list[CueConflict]:
    """The images in a folder and its subfolders, with the shape and the texture that their names give.

    Args:
        folder: a folder of files such as cat7-elephant1.png. A subfolder named after a category must have its shape.
        categories: the names that shapes and textures may have.

    Returns:
        One record an image.

    Raises:
        ImageError: the folder is missing or has no image, a name has another form or another category, or a file
            lies in the folder of another shape.
    """
    if not folder.is_dir():
        raise ImageError(f"expected a folder of cue-conflict images, but there is none at {shown(folder)}")
    return [_understood(file, categories) for file in images.files([folder])]


def _understood(file: Path, categories: Sequence[str]) -> CueConflict:
    match = _NAME.fullmatch(file.stem)
    if match is None:
        raise ImageError(
            f"{shown(file)} is not named like a cue-conflict image: expected SHAPE<n>-TEXTURE<m>, such as "
            f"{categories[0]}1-{categories[-1]}2{shown(file.suffix)}; rename it or take it out of the folder"
        )
    for name in match.groups():
        if name not in categories:
            raise ImageError(f"{shown(file)} names {name!r}, which is no category; there are {', '.join(categories)}")
    shape, texture = match.groups()
    if file.parent.name in categories and file.parent.name != shape:
        raise ImageError(f"{shown(file)} has the shape {shape!r} by its name and {file.parent.name!r} by its folder")
    return CueConflict(file, categories.index(shape), categories.index(texture))
