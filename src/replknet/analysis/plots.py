"""Pictures of results. Nothing else in the package draws."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from replknet.analysis.erf import ERF


def receptive_fields(fields: Mapping[str, ERF]) -> Figure:
    """Log-scaled receptive fields side by side, each with the squares that hold 50 % and 99 %."""
    figure, axes = plt.subplots(1, len(fields), figsize=(4.2 * len(fields), 4.4), squeeze=False)
    for axis, (title, field) in zip(axes[0], fields.items(), strict=True):
        axis.imshow(field.log_map.numpy(), cmap="RdYlGn", vmin=0, vmax=1)
        h, w = field.map.shape
        for threshold, style in ((0.5, "-"), (0.99, ":")):
            side = field.sides.get(threshold)
            if side is not None:
                corner = (w // 2 - side / 2, h // 2 - side / 2)
                axis.add_patch(plt.Rectangle(corner, side, side, fill=False, linestyle=style, color="black"))
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    return figure


_DPI = 110

# what an axis says of a score
_SCORES = {"val_top1": "accuracy, %", "val_miou": "mIoU, %", "val_map": "AP, %"}


def curves(series: Mapping[str, Sequence[Mapping[str, float]]], score: str = "val_top1") -> Figure:
    """Training loss and a validation score by epoch, one line a network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for label, rows in series.items():
        epochs = [row["epoch"] + 1 for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], marker="o", label=label)
        # a training may score nothing
        scored = [row for row in rows if score in row]
        right.plot([row["epoch"] + 1 for row in scored], [100 * row[score] for row in scored], marker="o")
    left.set(xlabel="epoch", ylabel="training loss, nats")
    right.set(xlabel="epoch", ylabel=_SCORES[score])
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def overlay(image: Image.Image, labels: Any, names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Figure:
    """An image under the colours of its pixels' classes, with a legend of those that cover most.

    Args:
        image: in RGB.
        labels: class of each pixel, `[H,W]`.
        names: of the classes.
        palette: of the classes, RGB from 0 to 255.
    """
    labels = np.asarray(labels)
    mixed = (np.asarray(image) / 2 + np.array(palette)[labels] / 2).astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=len(names))
    shown = [i for i in counts.argsort()[::-1][:20] if counts[i]]
    # pixels stay pixels: the picture is as large as the image, with room for the legend
    width, height = image.width / _DPI, image.height / _DPI
    legend = 1.9
    figure = plt.figure(figsize=(width + legend, height), dpi=_DPI)
    axis = figure.add_axes((0, 0, width / (width + legend), 1))
    axis.imshow(mixed, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    entries = []
    for i in shown:
        r, g, b = palette[i]
        entries.append(Patch(color=(r / 255, g / 255, b / 255), label=f"{names[i]} {counts[i] / labels.size:.1%}"))
    figure.legend(handles=entries, loc="center right", fontsize=8, frameon=False)
    return figure


def boxes(
    image: Image.Image,
    boxes: Any,
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    masks: Any = None,
) -> Figure:
    """An image with the objects in it: a box in the colour of its class, its name and its score.

    Args:
        image: in RGB.
        boxes: x1, y1, x2, y2 of the objects, pixels, `[n,4]`.
        labels: class of each.
        scores: of each, from 0 to 1.
        names: of the classes.
        masks: pixels of each object, `[n,H,W]`, bool, or None.
    """
    # pixels stay pixels
    figure = plt.figure(figsize=(image.width / _DPI, image.height / _DPI), dpi=_DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    drawn = np.asarray(image).astype(float)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]  # a list of colours
    for mask, label in zip([] if masks is None else np.asarray(masks), labels, strict=masks is not None):
        drawn[mask] = drawn[mask] / 2 + 255 * np.array(colours[label % 10]) / 2
    axis.imshow(drawn.astype(np.uint8), interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    # the best lie on top
    for (x1, y1, x2, y2), label, score in reversed(list(zip(np.asarray(boxes).tolist(), labels, scores, strict=True))):
        colour = colours[label % 10]
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
        # above the box where there is room
        axis.text(
            x1 + 1,
            y1 - 1,
            f"{names[label]} {score:.2f}",
            fontsize=6,
            color="white",
            verticalalignment="bottom" if y1 > 10 else "top",
            clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )
    axis.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    return figure


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Images by true class (rows) and predicted class (columns)."""
    n = len(classes)
    figure, axis = plt.subplots(figsize=(0.55 * n + 1.5, 0.55 * n + 1.2))
    axis.imshow(matrix, cmap="Blues")
    largest = max(max(row) for row in matrix)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            axis.text(
                j,
                i,
                str(count),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if 2 * count > largest else "black",
            )
    axis.set_xticks(range(n), classes, rotation=60, ha="right")
    axis.set_yticks(range(n), classes)
    axis.set(xlabel="predicted", ylabel="true")
    figure.tight_layout()
    return figure


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


def save(figure: Figure, path: Path) -> None:
    """Write a picture, in the format that the path's ending names; an earlier one is replaced when all is written."""
    part = path.with_name(f"part.{path.name}")
    figure.savefig(part, dpi=_DPI)
    # pyplot keeps every figure until then
    plt.close(figure)
    os.replace(part, path)


def as_html(figure: Figure, text: str) -> str:
    """An <img> element with the picture inside, described by `text`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    plt.close(figure)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
