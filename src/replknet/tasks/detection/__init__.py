"""Object detection and instance segmentation."""

from typing import TYPE_CHECKING

from replknet import imports
from replknet.tasks.detection import recipes, settings
from replknet.tasks.task import Task

TASK = Task(
    name="detection",
    noun="a detector",
    field="replknet_detection",
    keys=r"bbox_head\.(conv_cls|0\.fc_cls)\.weight",
    prediction=settings.PredictionSettings,
    evaluation=settings.EvaluationSettings,
    options=recipes.DetectionOptions,
    recipes=recipes.RECIPES,
)

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.tasks.detection.average_precision import Average as Average
    from replknet.tasks.detection.average_precision import DetectionScores as DetectionScores
    from replknet.tasks.detection.average_precision import as_coco_results as as_coco_results
    from replknet.tasks.detection.cascade import CascadeRCNN as CascadeRCNN
    from replknet.tasks.detection.cascade import Stage as Stage
    from replknet.tasks.detection.export import export_detector as export_detector
    from replknet.tasks.detection.export import export_pyramid as export_pyramid
    from replknet.tasks.detection.fcos import FCOS as FCOS
    from replknet.tasks.detection.files import DetectionDescription as DetectionDescription
    from replknet.tasks.detection.files import load_detection as load_detection
    from replknet.tasks.detection.files import save_detection as save_detection
    from replknet.tasks.detection.infer import evaluate as evaluate
    from replknet.tasks.detection.infer import predict as predict
    from replknet.tasks.detection.pyramid import Pyramid as Pyramid
    from replknet.tasks.detection.recipes import DetectionOptions as DetectionOptions
    from replknet.tasks.detection.rpn import RegionProposals as RegionProposals
    from replknet.tasks.detection.torchvision_detectors import mask_rcnn as mask_rcnn
    from replknet.tasks.detection.torchvision_detectors import torchvision_fcos as torchvision_fcos

_HOMES = {
    "Average": "replknet.tasks.detection.average_precision",
    "CascadeRCNN": "replknet.tasks.detection.cascade",
    "DetectionDescription": "replknet.tasks.detection.files",
    "DetectionOptions": "replknet.tasks.detection.recipes",
    "DetectionScores": "replknet.tasks.detection.average_precision",
    "FCOS": "replknet.tasks.detection.fcos",
    "Pyramid": "replknet.tasks.detection.pyramid",
    "RegionProposals": "replknet.tasks.detection.rpn",
    "Stage": "replknet.tasks.detection.cascade",
    "as_coco_results": "replknet.tasks.detection.average_precision",
    "evaluate": "replknet.tasks.detection.infer",
    "export_detector": "replknet.tasks.detection.export",
    "export_pyramid": "replknet.tasks.detection.export",
    "load_detection": "replknet.tasks.detection.files",
    "mask_rcnn": "replknet.tasks.detection.torchvision_detectors",
    "predict": "replknet.tasks.detection.infer",
    "save_detection": "replknet.tasks.detection.files",
    "torchvision_fcos": "replknet.tasks.detection.torchvision_detectors",
}
__all__ = ["TASK", *sorted(_HOMES)]

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
