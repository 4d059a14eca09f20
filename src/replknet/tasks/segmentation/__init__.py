"""Semantic segmentation with UperNet."""

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
