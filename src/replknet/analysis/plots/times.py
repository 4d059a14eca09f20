"""Times of layers and of networks."""

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def times_by_kernel(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]]) -> Figure:
    """Time against kernel size on a log scale: one panel a workload, one line an implementation.

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


def stack_times(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]],
    multiply_adds: Mapping[int, int],
    paper: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> Figure:
    """What a larger kernel costs, one column a workload. Above: times. Below: times relative to the smallest kernel.

    Args:
        panels: title -> label -> points of kernel side in pixels and the 20th, 50th and 80th percentile in ms. A label
            says who computes, then the memory format.
        multiply_adds: kernel side -> multiply-adds of any one workload.
        paper: title -> label -> kernel side -> time that the paper measured. These are shown below only, since times
            of another machine compare only as ratios.
    """
    columns = len(panels)
    figure, axes = plt.subplots(
        2, columns, figsize=(4.2 * columns + 0.4, 7.2), squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    ways = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    # sorted, so that the operator has the first colour
    whos = sorted({label.split()[0] for label in ways})
    for (title, lines), (above, below) in zip(panels.items(), axes.T, strict=True):
        for label, points in lines.items():
            sides, p20, p50, p80 = zip(*sorted(points), strict=True)
            style = {
                "color": f"C{whos.index(label.split()[0])}",
                "linestyle": "-" if label.endswith("nhwc") else "--",
                "marker": "o" if label.endswith("nhwc") else "s",
                "markersize": 3,
                "label": label,
            }
            above.plot(sides, p50, **style)
            above.fill_between(sides, p20, p80, color=style["color"], alpha=0.15)
            below.plot(sides, [ms / p50[0] for ms in p50], **style)
        for i, (label, times) in enumerate((paper or {}).get(title, {}).items()):
            first = times[min(times)]
            relative = [times[side] / first for side in sorted(times)]
            below.plot(
                sorted(times), relative, color="grey", linestyle=(":", "-.")[i % 2], label=f"the paper's {label}"
            )
        first = multiply_adds[min(multiply_adds)]
        relative = [multiply_adds[side] / first for side in sorted(multiply_adds)]
        below.plot(sorted(multiply_adds), relative, color="black", linewidth=1, label="multiply-adds")
        above.set(title=title, yscale="log")
        below.set(xlabel="kernel side, pixels", yscale="log")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time, ms")
    smallest = min(multiply_adds)
    axes[1][0].set_ylabel(f"times the {smallest}x{smallest} of the same line")
    entries = {text: handle for axis in axes[1] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


_PALE = {"tab:blue": "lightsteelblue", "tab:gray": "lightgray"}


def rivals(panels: Mapping[str, Mapping[str, tuple[float, float, float, float | None, float | None]]]) -> Figure:
    """Times and peak memory of networks, one row a task; the first network has its own colour.

    Args:
        panels: title -> network -> five numbers. Three are the 20th, 50th and 80th percentile of its time in ms. Two
            are memory in MB without the program: with the weights loaded, and at the peak of a run; None if unknown.
    """
    bars = [len(networks) for networks in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(11.5, 0.34 * sum(bars) + 0.9 * len(panels) + 0.3),
        squeeze=False,
        sharey="row",
        gridspec_kw={"height_ratios": bars},
        layout="constrained",
    )
    for (title, networks), (left, right) in zip(panels.items(), axes, strict=True):
        rows = range(len(networks))
        p20, p50, p80, loaded, peak = zip(*networks.values(), strict=True)
        colours = ["tab:blue" if row == 0 else "tab:gray" for row in rows]
        spread = [[b - a for a, b in zip(p20, p50, strict=True)], [b - a for a, b in zip(p50, p80, strict=True)]]
        left.barh(rows, p50, color=colours, height=0.7, xerr=spread, error_kw={"elinewidth": 1, "capsize": 2})
        for row, ms, end in zip(rows, p50, p80, strict=True):
            left.annotate(f"{ms:.0f}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        for row, weights, most in zip(rows, loaded, peak, strict=True):
            if weights is None or most is None:
                continue
            right.barh(row, weights, color=_PALE[colours[row]], height=0.7)
            right.barh(row, most - weights, left=weights, color=colours[row], height=0.7)
            text = f"{weights:.0f} + {most - weights:.0f}"
            right.annotate(text, (most, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_yticks(rows, networks)
        # the first network on top
        left.set(ylim=(len(networks) - 0.4, -0.6), title=title)
        for axis in (left, right):
            axis.margins(x=0.3)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
    axes[-1][0].set_xlabel("time of one image, ms: median, 20th to 80th percentile")
    axes[-1][1].set_xlabel("memory beyond the program, MB: weights + what a run adds")
    return figure
