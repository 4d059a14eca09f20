"""Image classification."""

from replknet.tasks.classification import imagenet, recipes
from replknet.tasks.task import Task

TASK = Task(
    name="classification",
    noun="a classifier",
    field="replknet",
    keys=r"head\.weight",
    options=recipes.ClassificationOptions,
    recipes=(*recipes.RECIPES, *imagenet.RECIPES),
)
