"""Pictures of results. Nothing else in the package draws."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

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


def curves(series: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss and validation accuracy by epoch, one line a network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for label, rows in series.items():
        epochs = [row["epoch"] + 1 for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], marker="o", label=label)
        right.plot(epochs, [100 * row["val_top1"] for row in rows], marker="o", label=label)
    left.set(xlabel="epoch", ylabel="training loss, nats")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
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


def as_html(figure: Figure, text: str) -> str:
    """An <img> element with the picture inside, described by `text`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
