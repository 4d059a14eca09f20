"""What every picture needs: a backend without a screen, a resolution, and export to files and HTML."""

import base64
import io
import os
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

# Agg needs no screen
matplotlib.use("Agg")
# names of files and classes are texts: a $ in them begins no formula
matplotlib.rcParams["text.parse_math"] = False

DPI = 110


def check_ending(path: Path) -> None:
    """Raise a ValueError if matplotlib writes no pictures with the path's ending."""
    known = sorted(FigureCanvasBase.filetypes)
    if path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"the ending of a picture must be one of {', '.join(known)}, got {path}")


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format of the path's ending; an earlier file is replaced once the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part.{path.name}")
    figure.savefig(part, dpi=DPI)
    # pyplot keeps every figure until it is closed
    plt.close(figure)
    os.replace(part, path)


def as_html(figure: Figure, text: str) -> str:
    """An <img> element with the picture inside, described by `text`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
