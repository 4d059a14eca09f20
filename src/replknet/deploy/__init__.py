"""Inference form, exported files, and the check that a file computes what torch computes."""

from typing import TYPE_CHECKING

from replknet import imports

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet.deploy.cards import ExportedError as ExportedError
    from replknet.deploy.inference import BOUNDS as BOUNDS
    from replknet.deploy.inference import Changes as Changes
    from replknet.deploy.inference import Optimized as Optimized
    from replknet.deploy.inference import optimize as optimize
    from replknet.deploy.verify import AccuracyError as AccuracyError
    from replknet.deploy.verify import Difference as Difference

_HOMES = {
    "AccuracyError": "replknet.deploy.verify",
    "BOUNDS": "replknet.deploy.inference",
    "Changes": "replknet.deploy.inference",
    "Difference": "replknet.deploy.verify",
    "ExportedError": "replknet.deploy.cards",
    "Optimized": "replknet.deploy.inference",
    "optimize": "replknet.deploy.inference",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, _HOMES)
