"""Errors of commands: one line on stderr, with --json also an object on stdout, and the exit code."""

import json
import os
import sys
import traceback
from contextlib import suppress

from safetensors import SafetensorError

from replknet.shown import shown

# those that a user can act on, as far as their class tells; see `is_ours`. safetensors has its own for full disks
USERS = (ValueError, OSError, MemoryError, RuntimeError, SafetensorError)
VARIABLE = "REPLKNET_DEBUG"
# checks that failed, by name: their modules import torch
_FAILED_CHECKS = ("AccuracyError", "LossError", "StateError")
# letters of a line: names of files may have hundreds, and a library may quote what it read
_START, _END = 700, 290


class UsageError(ValueError):
    """A command line that the parser refuses.

    Args:
        prog: the command, such as `replknet train`.
        text: what was expected, and what came.
    """

    def __init__(self, prog: str, text: str) -> None:
        super().__init__(text)
        self.prog = prog


def is_ours(error: BaseException) -> bool:
    """Whether the user can act on an error. All others are bugs, and keep their traceback.

    A RuntimeError of replknet's says what this machine or this network cannot do; torch's own are not for users.
    """
    ours = type(error).__module__.partition(".")[0] == "replknet"
    return isinstance(error, USERS) and (ours or not isinstance(error, RuntimeError))


def line_of(error: BaseException) -> str:
    """The text of an error in one line, without control characters; a very long one lacks its middle."""
    text = _text(error)
    # torch's loaders put the traceback of a worker before its error
    _, worker, last = text.rpartition("Original Traceback")
    if worker:
        text = last.rstrip().rpartition("\n")[2].partition(": ")[2]
    line = shown(" ".join(part.strip() for part in text.splitlines() if part.strip()))
    return line if len(line) <= _START + _END else f"{line[:_START]} ... {line[-_END:]}"


def _text(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error})" if str(error) else "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        # without the number: "runs/x: not a directory"
        file = error.filename if error.filename2 is None else error.filename2
        told = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return told if file is None else f"{os.fsdecode(file) if isinstance(file, bytes) else file}: {told}"
    return str(error) or type(error).__name__


def report(error: BaseException, prefix: str, line: str | None = None, as_json: bool = False) -> int:
    """Tell an error: a line on stderr for people, and with `as_json` an object in a line on stdout for programs.

    Args:
        error: the error. With `REPLKNET_DEBUG=1` its traceback is on stderr, too.
        prefix: start of the line, the command.
        line: the text; None: the error's own.
        as_json: whether the command was called with --json.

    Returns:
        The exit code.
    """
    told = line_of(error) if line is None else line
    if drop_output():
        told = f"the output cannot be written: {told}"
    # a full stream cannot take the text
    with suppress(OSError):
        if os.environ.get(VARIABLE, "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"{prefix}: {told}", file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError):
            print(json.dumps({"error": told}), flush=True)
    return 1 if type(error).__name__ in _FAILED_CHECKS else 2


def open_streams() -> None:
    """Prepare stdout and stderr for any text.

    A closed stream takes texts and drops them. Else the next file that is opened would get its number. A letter that
    the stream cannot write, such as a byte of a file's name that is no UTF-8, stands as an escape.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the whole process
        stream = getattr(sys, name)
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def drop_output() -> bool:
    """Send what stdout still holds to nowhere if it cannot be written; Python would try again at the end.

    Returns:
        Whether it could not be written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.stdout.flush()
        return True
    return False
