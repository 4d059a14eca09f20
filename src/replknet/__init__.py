"""Very large convolution kernels made practical: a depthwise operator, and the RepLKNet models on it.

Importing this package registers the models with timm, before or after timm is imported:
`timm.create_model("replknet_31b")`. It imports no timm and no torch; the names below are imported when they are used.
"""

from typing import TYPE_CHECKING

from replknet import imports

# for type checkers and editors; `_HOMES` says the same to Python
if TYPE_CHECKING:
    from replknet import analysis as analysis
    from replknet import bench as bench
    from replknet import data as data
    from replknet import deploy as deploy
    from replknet import kernels as kernels
    from replknet import models as models
    from replknet import nn as nn
    from replknet import ops as ops
    from replknet import tasks as tasks
    from replknet import train as train
    from replknet.kernels import use_backend as use_backend
    from replknet.models.checkpoints import load_checkpoint as load_checkpoint
    from replknet.nn.accelerate import accelerate as accelerate
    from replknet.nn.merge import merge as merge
    from replknet.nn.warm import warm as warm
    from replknet.ops.doctor import doctor as doctor
    from replknet.tasks.files import load as load
    from replknet.version import __version__ as __version__

_PACKAGES = ("analysis", "bench", "data", "deploy", "kernels", "models", "nn", "ops", "tasks", "train")
_HOMES = {
    **{name: f"replknet.{name}" for name in _PACKAGES},
    "accelerate": "replknet.nn.accelerate",
    "doctor": "replknet.ops.doctor",
    "load": "replknet.tasks.files",
    "load_checkpoint": "replknet.models.checkpoints",
    "merge": "replknet.nn.merge",
    "use_backend": "replknet.kernels",
    "warm": "replknet.nn.warm",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = imports.lazy_names(__name__, {**_HOMES, "__version__": "replknet.version"})


def _register() -> None:
    try:
        import replknet.models  # noqa: F401  # importing it registers
    except ImportError as error:
        import warnings

        # who has imported timm for something else still gets it
        warnings.warn(f"the networks of replknet are not registered with timm: {error}", RuntimeWarning, stacklevel=2)


imports.after_import("timm", _register)
