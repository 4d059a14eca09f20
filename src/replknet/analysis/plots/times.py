"""Times of layers."""

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def times_by_kernel(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]]) -> Figure:
    """Time against kernel size on a log scale, a panel a workload, a line an implementation.

    Args:
        panels: title -> label -> points of kernel side in pixels and the 20th, 50th and 80th percentile in ms.
    """
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 3.4 * height), squeeze=False)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colours = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, points in lines.items():
            sides, p20, p50, p80 = zip(*sorted(points), strict=True)
            style = "-" if label.startswith("operator") else "--"
            axis.plot(sides, p50, marker="o", markersize=3, linestyle=style, color=colours[label], label=label)
            axis.fill_between(sides, p20, p80, color=colours[label], alpha=0.2)
        axis.set(title=title, xlabel="kernel side, pixels", ylabel="time, ms", yscale="log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    return figure
