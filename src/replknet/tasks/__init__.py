"""The tasks of networks: one folder and one record a task, and the code that all tasks share.

A new task is a folder with a `TASK`, and its name in the tuple below.
"""

from collections.abc import Callable

from replknet.tasks import classification, detection, segmentation
from replknet.tasks.task import Task
from replknet.train.recipe import Recipe

TASKS: dict[str, Task] = {task.TASK.name: task.TASK for task in (classification, segmentation, detection)}

# the presets of `replknet train`: name -> a function that returns the recipe
RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for task in TASKS.values() for recipe in task.recipes
}

__all__ = ["RECIPES", "TASKS", "Task"]
