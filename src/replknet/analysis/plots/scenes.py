"""Images with the classes, boxes and masks that were found in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from replknet.analysis.plots.figure import DPI


def overlay(image: Image.Image, labels: Any, names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Figure:
    """An image mixed with the colours of its pixels' classes, and a legend of the 20 classes that cover most.

    Args:
        image: the image in RGB.
        labels: class of each pixel, `[H,W]`.
        names: names of the classes.
        palette: colours of the classes, RGB from 0 to 255.
    """
    labels = np.asarray(labels)
    mixed = (np.asarray(image) / 2 + np.array(palette)[labels] / 2).astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=len(names))
    shown = [i for i in counts.argsort()[::-1][:20] if counts[i]]
    # one pixel of the image is one pixel of the picture; the legend gets extra room
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
    """An image with its objects; each has a box in the colour of its class, a name and a score.

    Args:
        image: the image in RGB.
        boxes: x1, y1, x2, y2 of the objects, pixels, `[n,4]`.
        labels: class of each object.
        scores: score of each object, from 0 to 1.
        names: names of the classes.
        masks: pixels of each object, `[n,H,W]`, bool, or None.
    """
    # one pixel of the image is one pixel of the picture
    figure = plt.figure(figsize=(image.width / DPI, image.height / DPI), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    drawn = np.asarray(image).astype(float)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]  # a list of colours
    for mask, label in zip([] if masks is None else np.asarray(masks), labels, strict=masks is not None):
        drawn[mask] = drawn[mask] / 2 + 255 * np.array(colours[label % 10]) / 2
    axis.imshow(drawn.astype(np.uint8), interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    # the best objects come first, so they are drawn last: on top
    for (x1, y1, x2, y2), label, score in reversed(list(zip(np.asarray(boxes).tolist(), labels, scores, strict=True))):
        colour = colours[label % 10]
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
        # above the box if there is room
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
