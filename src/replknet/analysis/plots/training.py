"""Trainings and their scores: curves, confusion, seeds."""

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# score -> label of its axis
_SCORES = {"val_top1": "accuracy, %", "val_miou": "mIoU, %", "val_map": "AP, %"}


def curves(series: Mapping[str, Sequence[Mapping[str, float]]], score: str = "val_top1") -> Figure:
    """Training loss and a validation score by epoch, one line a network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for label, rows in series.items():
        epochs = [row["epoch"] + 1 for row in rows]
        left.plot(epochs, [row["train_loss"] for row in rows], marker="o", label=label)
        # a training may have no scores
        scored = [row for row in rows if score in row]
        right.plot([row["epoch"] + 1 for row in scored], [100 * row[score] for row in scored], marker="o")
    left.set(xlabel="epoch", ylabel="training loss, nats")
    right.set(xlabel="epoch", ylabel=_SCORES[score])
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


def seeds(values: Mapping[str, Sequence[float]], label: str) -> Figure:
    """A row for each name: a dot for each run, and a bar at their mean.

    Args:
        values: name -> one value a run; a name without runs keeps its row.
        label: label of the axis, with the unit.
    """
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.36 * len(values)))
    for row, found in enumerate(values.values()):
        axis.plot(found, [row] * len(found), "o", color="C0", alpha=0.6, markeredgewidth=0)
        if found:
            axis.plot([sum(found) / len(found)], [row], "|", color="black", markersize=16)
    axis.set_yticks(range(len(values)), list(values))
    axis.set(xlabel=label, ylim=(len(values) - 0.5, -0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure
