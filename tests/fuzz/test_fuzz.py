"""Damaged and hostile inputs of each format end in a result or in one line, within 10 s and a gigabyte."""

from random import Random

import pytest

from fuzz import CAMPAIGNS, TARGETS, frame
from fuzz.frame import Target
from fuzz.mutators import mutated, mutated_json
from matrix import matrix
from soak.campaign import failures

# the first 50 always, 500 in the full run
AT_ONCE = 50
FIRSTS = [(first,) for first in range(0, 500, AT_ONCE)]


@pytest.mark.parametrize("first", matrix(FIRSTS, FIRSTS[:1]))
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_input_does_harm(name, first):
    found = [failure for failure in failures(CAMPAIGNS[name], first, AT_ONCE) if failure is not None]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("name", matrix(TARGETS, ("safetensors", "megengine", "image", "coco-zip", "shards")))
def test_inputs_are_drawn_from_their_seed_alone(name, tmp_path):
    written = []
    for again in ("first", "second"):
        (tmp_path / again).mkdir()
        path = TARGETS[name].make(Random(f"{name} 7"), tmp_path / again)
        files = sorted(file for file in (tmp_path / again).rglob("*") if file.is_file())
        written.append((path.name, [file.read_bytes() for file in files]))
    assert written[0] == written[1]


class Refused(ValueError):
    pass


def _target(read):
    return Target("made", "does the frame see it", lambda random, folder: folder / "x", read, (Refused,))


def _raise(error):
    raise error


HELD = []


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda path: None, None),
        (lambda path: _raise(Refused("a line")), None),
        (lambda path: _raise(Refused("two\nlines")), "an error must be one line"),
        (lambda path: _raise(Refused("a" * 2000)), "an error must be one line"),
        (lambda path: _raise(KeyError("shape")), "KeyError: 'shape'"),
        (
            lambda path: HELD.append(bytearray(b"\1") * (2 * frame.BYTES)) or HELD.clear(),
            "GiB of memory, more than one",
        ),
        (lambda path: sum(range(10**7)), "s of the processor, more than 0"),
    ],
    ids=["result", "refused", "lines", "long", "uncaught", "memory", "time"],
)
def test_the_frame_sees_what_is_wrong(read, told, tmp_path, monkeypatch):
    if told and told.endswith("than 0"):
        monkeypatch.setattr(frame, "SECONDS", 0)
    found = frame.tried(_target(read), Random(0), tmp_path)
    assert found is None if told is None else told in (found or "")


def test_the_frame_sees_a_crash():
    worker = frame._Worker("no such target")
    assert "ended the process with 1" in (worker.tried(0) or "")
    assert worker.ended


def test_mutators_change_and_repeat():
    data, value = bytes(range(256)), {"a": [1, 2, {"b": "c"}], "d": None}
    assert len({mutated(Random(i), data) for i in range(100)}) > 90
    assert mutated(Random(5), data) == mutated(Random(5), data)
    changed = [mutated_json(Random(i), value) for i in range(100)]
    assert sum(one != value for one in changed) > 90
    assert value == {"a": [1, 2, {"b": "c"}], "d": None}
