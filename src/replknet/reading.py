"""The boundary to files. Whatever a library raises about a file becomes one error of ours, which names the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from replknet.limits import LimitError
from replknet.shown import shown

# letters of a library's message that an error quotes
_QUOTED = 200


@dataclass(frozen=True)
class Kind:
    """A kind of file, for the errors about it.

    Args:
        error: class of the errors.
        expected: what such a file is, such as "an image".
        way_out: what the reader can do about a damaged one.
    """

    error: type[Exception]
    expected: str
    way_out: str


@contextmanager
def reading(where: object, kind: Kind) -> Iterator[None]:
    """Turn every error that is raised in the block into one about the file.

    The block has the calls of the library that reads the file, and little else, so that our own mistakes keep their
    traceback. The library's error stays the cause; `REPLKNET_DEBUG=1` lets the command line show it.

    Args:
        where: the file, or another name for it.
        kind: what it should be.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: a package is not installed.
        kind.error: the library raised anything else, or the file asks for more than `replknet.limits` allows. The text
            names the file, what was expected, what came, and the way out.
    """
    try:
        yield
    except (kind.error, FileNotFoundError, ModuleNotFoundError):
        raise
    except LimitError as error:
        raise kind.error(f"{shown(where)} {error}") from error
    # the one place: libraries document few of the errors that damaged files cause
    except Exception as error:
        raise kind.error(f"{shown(where)} cannot be read as {kind.expected}: {told(error)}; {kind.way_out}") from error


@contextmanager
def as_utf8(path: Path) -> Iterator[Path]:
    """Another path to a file whose name is no UTF-8; any other path as it is.

    Linux allows such names, and libraries written in C++ or Rust refuse them.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def told(error: Exception) -> str:
    """The first line of an error's message, shortened; errors without one are told in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    first = str(error).strip().partition("\n")[0]
    # a missing key is told by its name alone
    text = f"{type(error).__name__} {first}".strip() if not first or isinstance(error, KeyError) else first
    text = shown(text).rstrip(".;: ")
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
