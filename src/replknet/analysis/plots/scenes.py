"""Images with what was found in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from replknet.analysis.plots.figure import DPI


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
    width, height = image.width / DPI, image.height / DPI
    legend = 1.9
    figure = plt.figure(figsize=(width + legend, height), dpi=DPI)
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
    figure = plt.figure(figsize=(image.width / DPI, image.height / DPI), dpi=DPI)
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
