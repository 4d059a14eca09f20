"""Names and texts from files, as a terminal may show them."""

import os
from pathlib import PurePath


def shown(value: object) -> str:
    """A text without control characters, which could move the cursor or forge a line.

    Args:
        value: a text or a path. A file's name may have bytes that are no UTF-8.

    Returns:
        The text in one line. Control characters, and bytes that are no UTF-8, stand as escapes such as `\\x1b`.
    """
    text = os.fspath(value) if isinstance(value, PurePath) else str(value)
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # Python's stand-in for a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
