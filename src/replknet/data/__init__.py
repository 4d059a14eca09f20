"""Data sets, one a file, and transforms."""

from typing import TYPE_CHECKING

from replknet import imports

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.data.coco import CocoImages as CocoImages
    from replknet.data.coco import Problem as Problem
    from replknet.data.cue_conflict import CueConflict as CueConflict
    from replknet.data.cue_conflict import CueConflicts as CueConflicts
    from replknet.data.cue_conflict import cue_conflicts as cue_conflicts
    from replknet.data.images import ImageError as ImageError

# a data set needs torchvision, Pillow or timm, and nobody needs all data sets
_HOMES = {
    "CocoImages": "replknet.data.coco",
    "CueConflict": "replknet.data.cue_conflict",
    "CueConflicts": "replknet.data.cue_conflict",
    "ImageError": "replknet.data.images",
    "Problem": "replknet.data.coco",
    "cue_conflicts": "replknet.data.cue_conflict",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
