"""Receptive fields."""

from collections.abc import Mapping

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
