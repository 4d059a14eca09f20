"""Colour in texts for people: only in a terminal, and never if NO_COLOR is set (https://no-color.org)."""

import os
import sys
from typing import TextIO


def bold(text: str) -> str:
    """A heading on stdout."""
    return _styled(text, "1", sys.stdout)


def red(text: str) -> str:
    """The beginning of an error on stderr."""
    return _styled(text, "31", sys.stderr)


def _styled(text: str, code: str, stream: TextIO) -> str:
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if wanted else text
