"""The tasks of networks: one folder and one record a task, and the code that all tasks share.

A new task is a folder with a `TASK`, and its name in the tuple below.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from replknet import imports
from replknet.tasks import classification, detection, segmentation
from replknet.tasks.task import Task
from replknet.train.recipe import Recipe

TASKS: dict[str, Task] = {task.TASK.name: task.TASK for task in (classification, segmentation, detection)}

# the presets of `replknet train`: name -> a function that returns the recipe
RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for task in TASKS.values() for recipe in task.recipes
}

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.tasks.files import load as load
    from replknet.tasks.files import load_network as load_network
    from replknet.tasks.task import Network as Network
    from replknet.tasks.training import fit as fit

_HOMES = {
    "Network": "replknet.tasks.task",
    "fit": "replknet.tasks.training",
    "load": "replknet.tasks.files",
    "load_network": "replknet.tasks.files",
}
__all__ = ["RECIPES", "TASKS", "Task", *sorted(_HOMES)]

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
