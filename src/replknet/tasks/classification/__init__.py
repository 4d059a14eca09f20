"""Image classification."""

from replknet.tasks.classification import imagenet, recipes, settings
from replknet.tasks.task import Task

TASK = Task(
    name="classification",
    noun="a classifier",
    field="replknet",
    keys=r"head\.weight",
    prediction=settings.PredictionSettings,
    evaluation=settings.EvaluationSettings,
    int8=settings.Int8Settings,
    options=recipes.ClassificationOptions,
    recipes=(*recipes.RECIPES, *imagenet.RECIPES),
)
