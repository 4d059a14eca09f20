"""Files and folders that a command is to write: looked at before the work begins, so that no work is lost."""

import os
from pathlib import Path


def check_file(path: Path | None, option: str) -> None:
    """Check that a file can be written; a missing folder will be made. Without a path there is nothing to check.

    Args:
        path: the file.
        option: the option that names it, for the error.

    Raises:
        ValueError: it is a folder or a device, or its folder is a file.
        OSError: its name is too long, or its folder must not be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} must name a file, and {path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} must name a file, and {path} is a device: name a file in a folder of yours")
    _check_parents(path, option)


def check_folder(path: Path | None, option: str) -> None:
    """Check that a folder is there or can be made; otherwise as `check_file`.

    Args:
        path: the folder.
        option: the option that names it, for the error.

    Raises:
        ValueError: it is a file, or is to be in a file.
        OSError: its name is too long, or it must not be written to.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} must name a folder, and {path} is a file: name another one")
    _check_parents(path / "file", option)


def _check_parents(path: Path, option: str) -> None:
    """Check the nearest folder above a path that is there."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{option} {path} would be in {folder}, which is a file: name a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path} cannot be written: {folder} does not allow it; name another folder")
