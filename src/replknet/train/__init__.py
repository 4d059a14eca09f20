"""Training of all tasks: recipes, hardware settings, and a Lightning Trainer that runs a job and fills a folder."""

from typing import TYPE_CHECKING

from replknet import imports

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.train.fit import ResumeError as ResumeError
    from replknet.train.guard import LossError as LossError
    from replknet.train.hardware import Hardware as Hardware
    from replknet.train.recipe import Recipe as Recipe
    from replknet.train.state import StateError as StateError

_HOMES = {
    "Hardware": "replknet.train.hardware",
    "LossError": "replknet.train.guard",
    "Recipe": "replknet.train.recipe",
    "ResumeError": "replknet.train.fit",
    "StateError": "replknet.train.state",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
