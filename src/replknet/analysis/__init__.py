"""What networks cost and what they see."""

from replknet.analysis.cost import Cost, cost
from replknet.analysis.erf import ERF, effective_receptive_field
from replknet.analysis.learned_kernels import (
    LayerKernels,
    energy_within,
    layer_kernels,
    magnitude_by_distance,
    small_share,
)
from replknet.analysis.shape_bias import CATEGORIES, ShapeBias, decided, decisions, likeliest, shape_bias

__all__ = [
    "CATEGORIES",
    "ERF",
    "Cost",
    "LayerKernels",
    "ShapeBias",
    "cost",
    "decided",
    "decisions",
    "effective_receptive_field",
    "energy_within",
    "layer_kernels",
    "likeliest",
    "magnitude_by_distance",
    "shape_bias",
    "small_share",
]
