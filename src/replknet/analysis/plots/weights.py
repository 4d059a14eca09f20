"""Learned kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from replknet.analysis.learned_kernels import LayerKernels, magnitude_by_distance, mean_magnitude

# most layers that `kernels` shows, and most kernels of a layer
_LAYERS, _EXAMPLES = 8, 8


def kernels(layers: Sequence[LayerKernels], name: str) -> Figure:
    """Kernels of a network, one row a layer: examples, the mean of |w| over channels, and this mean by distance.

    The examples go evenly from the largest norm to the smallest; each has its own scale. Colours are signed square
    roots: a far tap has a tenth of the centre's weight, and should be visible. If there are many layers, some are
    shown, evenly chosen, and the title says so.

    Args:
        layers: at least one layer.
        name: name of the network.
    """
    shown = [layers[i] for i in _evenly(len(layers), _LAYERS)]
    magnitudes = [mean_magnitude(layer.merged).numpy() for layer in shown]
    # one scale for all maps: two decades at most, but wide enough that noise around 1 looks flat
    top = max(2.0, *(float(magnitude.max()) for magnitude in magnitudes))
    bottom = min(0.5, max(top / 100, min(float(magnitude.min()) for magnitude in magnitudes)))
    # heights in inches
    above, row, below = 0.85, 1.6, 0.6
    height = above + row * len(shown) + below
    figure = plt.figure(figsize=(14, height))
    # the empty column leaves room for the numbers on the curves' axes
    axes = figure.subplots(
        len(shown),
        _EXAMPLES + 3,
        squeeze=False,
        gridspec_kw={
            "width_ratios": [*[1] * (_EXAMPLES + 1), 0.15, 2.9],
            "left": 0.01,
            "right": 0.99,
            "bottom": below / height,
            "top": 1 - above / height,
            "wspace": 0.1,
            "hspace": 0.45,
        },
    )
    for (*squares, empty, curve), layer, magnitude in zip(axes, shown, magnitudes, strict=True):
        _examples(squares[:-1], layer)
        # values below the scale get its darkest colour; unclipped, a zero would get no colour
        image = squares[-1].imshow(magnitude.clip(bottom), norm=LogNorm(bottom, top))
        for axis in squares:
            axis.set_xticks([])
            axis.set_yticks([])
            # directly below the layer's name, also if the kernel is not square
            axis.set_anchor("N")
        empty.set_axis_off()
        curve.sharey(axes[0][-1])
        _profile(curve, layer)
    chosen = "" if len(shown) == len(layers) else f"; {len(shown)} of {len(layers)} layers, evenly chosen"
    title = f"{name}: kernels from the largest norm to the smallest, colour: signed square root{chosen}"
    figure.suptitle(title, x=0.01, y=1 - 0.12 / height, ha="left", va="top", fontsize=13)
    branched = [curve for (*_, curve), layer in zip(axes, shown, strict=True) if layer.small is not None]
    for curve in branched[:1]:
        curve.legend(fontsize=8)
    axes[0][-3].set_title("mean |w|", fontsize=10)
    axes[0][-1].set_title("mean |w| by distance; 1: spread evenly", fontsize=10)
    axes[-1][-1].set_xlabel("distance from the centre, taps", fontsize=9)
    low, high = axes[0][-1].get_ylim()
    axes[0][-1].set_ylim(min(low, 0.4), max(high, 2.5))
    box = axes[-1][-3].get_position(original=True)
    bar = figure.add_axes((box.x0, 0.4 / height, box.width, 0.1 / height))
    scale = figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[bottom, 1, top], format="{x:.2g}")
    scale.ax.minorticks_off()
    scale.ax.tick_params(labelsize=8)
    return figure


def _evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()


def _examples(axes: Sequence[Any], layer: LayerKernels) -> None:
    norms = layer.merged.flatten(1).norm(dim=1)
    order = norms.argsort(descending=True, stable=True)
    for axis, rank in zip(axes, _evenly(layer.channels, len(axes)), strict=False):
        channel = int(order[rank])
        kernel = layer.merged[channel].numpy()
        # a kernel of zeros may have any scale
        largest = abs(kernel).max() or 1.0
        axis.imshow(np.sign(kernel) * np.sqrt(abs(kernel) / largest), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_xlabel(f"{channel}: norm {norms[channel]:.2g}", fontsize=8, labelpad=2)
    for axis in axes[layer.channels :]:
        axis.set_axis_off()
    tall, wide = layer.sides
    # an annotation: the place of an axis title would depend on the kernel's proportions
    box = axes[0].get_position(original=True)
    axes[0].annotate(
        f"{layer.name}  {tall}x{wide}, {layer.channels} channels",
        (box.x0, box.y1),
        xycoords="figure fraction",
        xytext=(0, 5),
        textcoords="offset points",
        annotation_clip=False,
        fontsize=10,
    )


def _profile(axis: Any, layer: LayerKernels) -> None:
    """Magnitude by distance: of the merged kernels and, if they are known, of both branches."""
    lines = [("merged", layer.merged, "black", "-")]
    if layer.large is not None and layer.small is not None:
        lines += [("large branch", layer.large, "C0", "--"), ("small branch", layer.small, "C3", "-")]
    for label, part, colour, style in lines:
        # a logarithmic axis has no place for zeros, such as those around a small kernel
        points = {d: value for d, value in magnitude_by_distance(part, layer.merged).items() if value > 0}
        axis.plot(list(points), list(points.values()), style, color=colour, marker="o", markersize=3.5, label=label)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
