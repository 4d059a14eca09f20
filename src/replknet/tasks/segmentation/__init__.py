"""Semantic segmentation with UperNet."""

from typing import TYPE_CHECKING

from replknet import imports
from replknet.tasks.segmentation import recipes, settings
from replknet.tasks.task import Task

TASK = Task(
    name="segmentation",
    noun="a segmentation network",
    field="replknet_segmentation",
    keys=r"decode_head\.classifier\.weight",
    prediction=settings.PredictionSettings,
    evaluation=settings.EvaluationSettings,
    options=recipes.SegmentationOptions,
    recipes=recipes.RECIPES,
)

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.tasks.segmentation.export import SegmentationCard as SegmentationCard
    from replknet.tasks.segmentation.export import export_segmenter as export_segmenter
    from replknet.tasks.segmentation.export import segmentation_card as segmentation_card
    from replknet.tasks.segmentation.files import SegmentationDescription as SegmentationDescription
    from replknet.tasks.segmentation.files import load_segmentation as load_segmentation
    from replknet.tasks.segmentation.files import save_segmentation as save_segmentation
    from replknet.tasks.segmentation.heads import UperNet as UperNet
    from replknet.tasks.segmentation.heads import without_auxiliary as without_auxiliary
    from replknet.tasks.segmentation.infer import Inference as Inference
    from replknet.tasks.segmentation.infer import SegmentationScores as SegmentationScores
    from replknet.tasks.segmentation.infer import evaluate as evaluate
    from replknet.tasks.segmentation.infer import inference_of as inference_of
    from replknet.tasks.segmentation.infer import predict as predict
    from replknet.tasks.segmentation.recipes import SegmentationOptions as SegmentationOptions

_HOMES = {
    "Inference": "replknet.tasks.segmentation.infer",
    "SegmentationCard": "replknet.tasks.segmentation.export",
    "SegmentationDescription": "replknet.tasks.segmentation.files",
    "SegmentationOptions": "replknet.tasks.segmentation.recipes",
    "SegmentationScores": "replknet.tasks.segmentation.infer",
    "UperNet": "replknet.tasks.segmentation.heads",
    "evaluate": "replknet.tasks.segmentation.infer",
    "export_segmenter": "replknet.tasks.segmentation.export",
    "inference_of": "replknet.tasks.segmentation.infer",
    "load_segmentation": "replknet.tasks.segmentation.files",
    "predict": "replknet.tasks.segmentation.infer",
    "save_segmentation": "replknet.tasks.segmentation.files",
    "segmentation_card": "replknet.tasks.segmentation.export",
    "without_auxiliary": "replknet.tasks.segmentation.heads",
}
__all__ = ["TASK", *sorted(_HOMES)]

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
