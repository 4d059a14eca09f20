"""Object detection and instance segmentation."""

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
