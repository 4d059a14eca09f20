"""Small files of a training and of experiments: written completely or not at all, and read with one clear error."""

import json
import os
from pathlib import Path
from typing import Any

from replknet import limits
from replknet.reading import Kind, reading
from replknet.shown import shown


class FileError(ValueError):
    """A file of a training that is damaged. The text says which, why, and what to do."""


# of `metrics.json`
CURVE = Kind(FileError, "the curve of a training", "remove the folder of the training, and train again")


def write_text(path: Path, text: str) -> None:
    """Write a text file; an earlier file is replaced once the new one is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def read_json(path: Path, kind: Kind) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: what it should be.

    Raises:
        FileNotFoundError: there is no such file.
        kind.error: it is no JSON, or longer than `limits.LIST`.
    """
    with reading(path, kind):
        with path.open("rb") as file:
            # a pipe has no size
            text = file.read(int(limits.LIST * limits.factor()) + 1)
        limits.check(len(text), limits.LIST, "bytes of JSON")
        return json.loads(text)


def rows_of(path: Path, kind: Kind) -> list[dict[str, float]]:
    """The rows of `metrics.json`: for each epoch its figures.

    Raises:
        FileNotFoundError: there is no such file.
        kind.error: it has something else.
    """
    rows = read_json(path, kind)
    wrong = wrong_rows(rows)
    if wrong is not None:
        raise kind.error(f"{shown(path)} is not {kind.expected}: {wrong}; {kind.way_out}")
    found: list[dict[str, float]] = rows
    return found


def wrong_rows(rows: object) -> str | None:
    """Why a value is no list of rows with figures, or None."""
    if not isinstance(rows, list):
        return f"expected a list of rows, got {told(rows)}"
    for row in rows:
        if not isinstance(row, dict):
            return f"expected a row of figures, got {told(row)}"
        for name in ("epoch", "train_loss"):
            if name not in row:
                return f"a row lacks {name}"
        for name, value in row.items():
            if not isinstance(name, str) or not is_number(value):
                return f"{told(name)} must be a number, got {told(value)}"
    return None


def is_number(value: object) -> bool:
    """Whether a value is a number as JSON has them: not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def told(value: object) -> str:
    """A value of a file in an error: shortened, and with a container's type alone."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "an integer of more than thirty digits"
    text = shown(repr(value[:60] if isinstance(value, str) else value))
    return text
