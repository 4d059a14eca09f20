"""Changes to valid files, drawn from random numbers: of bytes, of JSON, and of the members of zip archives."""

import io
import json
import struct
import zipfile
from copy import deepcopy
from itertools import islice
from random import Random
from typing import Any

# numbers at the edges of the types that files store them in
_EDGES = (0, 1, 7, 8, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)


# nodes of a JSON value that may be changed
_PLACES = 20_000


def mutated(random: Random, data: bytes) -> bytes:
    """The bytes with one to eight changes: flipped, cut, doubled, moved, or replaced by extreme lengths."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        if not changed:
            break
        random.choice(_CHANGES)(random, changed)
    return bytes(changed)


def _place(random: Random, data: bytearray) -> int:
    # headers are short and at the beginning or the end: half of the changes go there
    place = random.random()
    if place < 0.35:
        return random.randrange(min(len(data), 512))
    if place < 0.5:
        return len(data) - 1 - random.randrange(min(len(data), 512))
    return random.randrange(len(data))


def _flip(random: Random, data: bytearray) -> None:
    data[_place(random, data)] ^= 1 << random.randrange(8)


def _byte(random: Random, data: bytearray) -> None:
    data[_place(random, data)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _cut(random: Random, data: bytearray) -> None:
    del data[_place(random, data) :]


def _remove(random: Random, data: bytearray) -> None:
    start = _place(random, data)
    del data[start : start + random.choice((1, 2, 4, 16, 256))]


def _double(random: Random, data: bytearray) -> None:
    start = _place(random, data)
    block = data[start : start + random.choice((1, 4, 16, 256, 4096))]
    data[start:start] = block * random.choice((1, 1, 2, 50))


def _insert(random: Random, data: bytearray) -> None:
    start = _place(random, data)
    data[start:start] = random.choice((b"\0" * 64, b"\xff" * 64, random.randbytes(16), b"\x1b[2J", b"[" * 2000))


def _move(random: Random, data: bytearray) -> None:
    start, to, size = _place(random, data), _place(random, data), random.choice((4, 16, 256))
    block = data[start : start + size]
    data[to : to + len(block)] = block


def _number(random: Random, data: bytearray) -> None:
    size, code = random.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    value = (random.choice(_EDGES) + random.choice((-1, 0, 0, 1))) % 2 ** (8 * size)
    start = _place(random, data)
    data[start : start + size] = struct.pack(random.choice("<>") + code, value)


_CHANGES = (_flip, _flip, _byte, _byte, _cut, _remove, _double, _insert, _move, _number, _number)


def extreme(random: Random) -> Any:
    """A value that JSON can hold and that nobody expects."""
    return random.choice(_EXTREMES)(random)


def _nested(random: Random) -> Any:
    value: Any = []
    for _ in range(random.choice((3, 50, 400))):
        value = [value] if random.random() < 0.7 else {"a": value}
    return value


_EXTREMES = (
    lambda random: random.choice((None, True, False, "", [], {}, [[]], [None], {"": ""}, [1, 2])),
    lambda random: random.choice((0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 10**6, 10**9, 20_000)),
    lambda random: random.choice((0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), 0.1)),
    lambda random: random.choice(("\x1b[2Jwiped", "a\nb", "\0", "\udcff", "\u202e", "x" * 100_000, "../../etc", "🦒")),
    lambda random: [extreme(random) for _ in range(random.choice((1, 4, 5)))],
    lambda random: [1] * random.choice((100, 100_000)),
    _nested,
)


def mutated_json(random: Random, value: Any) -> Any:
    """A copy of a JSON value with one to four of its nodes changed: replaced, removed, doubled, or renamed."""
    changed = [deepcopy(value)]
    for _ in range(random.choice((1, 1, 2, 4))):
        # what was doubled twice has millions
        places = list(islice(_places(changed), _PLACES))
        # the deeper a node, the more of its kind there are: choose the depth first
        depth = random.choice(sorted({depth for depth, _, _ in places}))
        _, parent, key = random.choice([place for place in places if place[0] == depth])
        _change(random, parent, key)
    return changed[0]


def _places(value: Any, depth: int = 0) -> Any:
    """Each node below a value: its depth, and where it is."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield depth, value, key
        if depth < 12:
            yield from _places(value[key], depth + 1)


def _change(random: Random, parent: Any, key: Any) -> None:
    what = random.random()
    if what < 0.6 or (isinstance(parent, list) and len(parent) == 1):
        parent[key] = extreme(random)
    elif what < 0.75:
        del parent[key]
    elif isinstance(parent, list):
        parent[key:key] = [parent[key]] * random.choice((1, 100))
    else:
        parent[random.choice(("", "\x1b[2J", "id", "x" * 1000, key + "_"))] = parent.pop(key)


def mutated_text(random: Random, value: Any) -> bytes:
    """JSON of a changed value, sometimes with changed bytes."""
    text = json.dumps(mutated_json(random, value)).encode()
    return mutated(random, text) if random.random() < 0.2 else text


def zip_members(data: bytes) -> dict[str, bytes]:
    """The members of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of these members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            # with a date of its own, not the clock's
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return content.getvalue()


def mutated_zip(random: Random, members: dict[str, bytes]) -> bytes:
    """An archive with a member changed, left out, renamed or blown up, or with its own bytes changed."""
    members = dict(members)
    name = random.choice(list(members))
    what = random.random()
    if what < 0.45:
        members[name] = mutated(random, members[name])
    elif what < 0.55:
        del members[name]
    elif what < 0.65:
        new = random.choice((f"../{name}", f"/{name}", name.upper(), f"{name}\x1b[2J", "x" * 300, "."))
        members[new] = members.pop(name)
    elif what < 0.7:
        members[name] = bytes(random.choice((10**6, 3 * 10**7)))
    compression = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    data = zip_of(members, compression if random.random() < 0.3 else zipfile.ZIP_STORED)
    return mutated(random, data) if what >= 0.7 else data
