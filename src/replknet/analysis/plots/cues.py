"""Shape bias."""

import math
from collections.abc import Mapping

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from replknet.analysis.shape_bias import ShapeBias


def shape_bias(results: Mapping[str, ShapeBias], title: str) -> Figure:
    """The share of shape decisions for each category of the shape, one marker a network, as in Geirhos et al.

    Args:
        results: label -> counts, all with the same categories. A line shows a network's overall bias. A category
            without a decision for either cue has no marker.
        title: title of the figure: which images the counts are for.
    """
    categories = next(iter(results.values())).categories
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(categories) + 1.9), layout="constrained")
    rows = range(len(categories))
    for row in rows[:-1]:
        axis.axhline(row + 0.5, color="grey", linestyle=":", alpha=0.4)
    for i, (label, result) in enumerate(results.items()):
        marker, colour = "osD^vP*X"[i % 8], f"C{i % 10}"
        text = label if result.bias is None else f"{label}: {result.bias:.1%}"
        shares = [math.nan if share is None else share for share in result.per_category]
        axis.scatter(
            shares,
            rows,
            marker=marker,
            color=colour,
            edgecolor="black",
            linewidth=0.5,
            label=text,
            clip_on=False,
            zorder=3,
        )
        if result.bias is not None:
            axis.axvline(result.bias, color=colour)
    # shape on the left, texture on the right, the first category on top
    axis.set(xlim=(1, 0), ylim=(len(categories) - 0.5, -0.5), title=title)
    axis.set_yticks(rows, categories)
    axis.set_xlabel("shape decisions / (shape + texture decisions)")
    axis.set_ylabel("category of the shape")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    return figure
