"""Pictures of results. Nothing else in the package draws."""

from replknet.analysis.plots.cues import shape_bias
from replknet.analysis.plots.fields import log_maps, receptive_fields
from replknet.analysis.plots.figure import as_html, check_ending, save
from replknet.analysis.plots.scenes import boxes, overlay
from replknet.analysis.plots.times import rivals, stack_times, times_by_kernel
from replknet.analysis.plots.training import confusion, curves, seeds
from replknet.analysis.plots.weights import kernels

__all__ = [
    "as_html",
    "boxes",
    "check_ending",
    "confusion",
    "curves",
    "kernels",
    "log_maps",
    "overlay",
    "receptive_fields",
    "rivals",
    "save",
    "seeds",
    "shape_bias",
    "stack_times",
    "times_by_kernel",
]
