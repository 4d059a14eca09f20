"""Pictures of results. Nothing else in the package draws."""

from replknet.analysis.plots.cues import shape_bias
from replknet.analysis.plots.fields import receptive_fields
from replknet.analysis.plots.figure import as_html, save
from replknet.analysis.plots.scenes import boxes, overlay
from replknet.analysis.plots.times import times_by_kernel
from replknet.analysis.plots.training import confusion, curves
from replknet.analysis.plots.weights import kernels

__all__ = [
    "as_html",
    "boxes",
    "confusion",
    "curves",
    "kernels",
    "overlay",
    "receptive_fields",
    "save",
    "shape_bias",
    "times_by_kernel",
]
