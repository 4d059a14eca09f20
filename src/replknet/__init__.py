"""Very large convolution kernels made practical: a depthwise operator, and the RepLKNet models on it.

Importing this package registers the models with timm: `timm.create_model("replknet_31b")`.
"""

from importlib.metadata import PackageNotFoundError, version

from replknet import kernels, models, nn, ops
from replknet.kernels import use_backend
from replknet.models import load_checkpoint
from replknet.nn import accelerate, merge, warm
from replknet.ops import doctor

try:
    __version__ = version("replknet")
except PackageNotFoundError:
    # a source tree that was not installed, as `make gpu` runs it
    __version__ = "0+source"
__all__ = [
    "accelerate",
    "doctor",
    "kernels",
    "load_checkpoint",
    "merge",
    "models",
    "nn",
    "ops",
    "use_backend",
    "warm",
]
