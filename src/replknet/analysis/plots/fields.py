"""Receptive fields."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from replknet.analysis.erf import ERF


def receptive_fields(fields: Mapping[str, ERF]) -> Figure:
    """Receptive fields side by side, with the squares that hold 50 % and 99 %; below, how squares fill up.

    Each map is on its own scale and relative to its own largest value. All maps share their colours.
    """
    columns = min(4, len(fields))
    rows = -(-len(fields) // columns)
    heights = [4.3 * rows, 3.2]
    figure = plt.figure(figsize=(max(6.4, 4.2 * columns), sum(heights)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    axes = above.subplots(rows, columns, squeeze=False)
    for axis, (title, field) in zip(axes.flat, fields.items(), strict=False):
        picture = axis.imshow(field.scaled.numpy(), cmap="RdYlGn", vmin=0, vmax=1)
        h, w = field.map.shape
        held = []
        for threshold, style in ((0.5, "-"), (0.99, ":")):
            side = field.sides.get(threshold)
            if side is not None:
                corner = (w // 2 - side / 2, h // 2 - side / 2)
                axis.add_patch(plt.Rectangle(corner, side, side, fill=False, linestyle=style, color="black"))
                held.append(f"{100 * threshold:.0f} % in {side}x{side}")
        axis.set(title=title, xlabel=", ".join(held), xticks=[], yticks=[])
    for axis in axes.flat[len(fields) :]:
        axis.set_axis_off()
    above.colorbar(picture, ax=axes, shrink=0.8, label="share of the largest value")
    _filling(below.subplots(), fields)
    return figure


def _filling(axis: Any, fields: Mapping[str, ERF]) -> None:
    """The share of the map in centred squares against their area, one line a network."""
    for label, field in fields.items():
        areas, shares = zip(*field.curve(), strict=True)
        axis.plot([100 * a for a in areas], [100 * s for s in shares], label=label)
    axis.set(
        xlabel="area of the centred square, % of the image", ylabel="held of the map, %", xlim=(0, 100), ylim=(0, 102)
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")


def log_maps(maps: Mapping[str, Sequence[Sequence[float]]], columns: int = 4) -> Figure:
    """Log-scaled receptive fields, from 0 to 1, side by side on one scale."""
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, maps.items(), strict=False):
        axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure
