"""The boundary to files: limits, errors that name the file, and texts that cannot forge a line."""

from pathlib import Path

import pytest

from replknet import limits
from replknet.limits import LimitError, check
from replknet.reading import Kind, reading
from replknet.shown import shown


class Damaged(ValueError):
    pass


KIND = Kind(Damaged, "weights", "fetch it again")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (KeyError("shape"), "KeyError 'shape'"),
        (RuntimeError("PytorchStreamReader failed:\n<a long stack>"), "PytorchStreamReader failed"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (MemoryError(), "it asks for more memory than there is"),
        (AssertionError(), "AssertionError"),
        (PermissionError(13, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
        (ValueError("\x1b[2Jwiped"), r"\x1b[2Jwiped"),
        (ValueError("a" * 500), "a" * 200 + "..."),
    ],
)
def test_whatever_a_library_raises_names_the_file_and_the_way_out(raised, told):
    with pytest.raises(Damaged) as error, reading(Path("a.pth"), KIND):
        raise raised
    assert str(error.value) == f"a.pth cannot be read as weights: {told}; fetch it again"
    assert error.value.__cause__ is raised


@pytest.mark.parametrize(
    "raised",
    [FileNotFoundError("no checkpoint at a"), ModuleNotFoundError("onnx"), Damaged("ours"), KeyboardInterrupt()],
)
def test_what_is_said_well_already_stays_as_it_is(raised):
    with pytest.raises(type(raised)) as error, reading("a.pth", KIND):
        raise raised
    assert error.value is raised


def test_a_limit_inside_a_file_names_the_file():
    with pytest.raises(Damaged) as error, reading("a.pth", KIND):
        check(1_000_000, limits.BLOCKS, "blocks in a stage")
    assert str(error.value).startswith("a.pth asks for 1,000,000 blocks in a stage, more than the 200 allowed; ")


def test_limits_say_how_they_are_raised_and_that_number_is_enough(monkeypatch):
    check(200, limits.BLOCKS, "blocks")
    with pytest.raises(LimitError, match=r"asks for 1,001 blocks, more than the 200 allowed; .* REPLKNET_LIMITS=6"):
        check(1001, limits.BLOCKS, "blocks")
    monkeypatch.setenv(limits.VARIABLE, "6")
    check(1001, limits.BLOCKS, "blocks")
    for endless in (float("inf"), float("nan")):
        with pytest.raises(LimitError):
            check(endless, limits.BLOCKS, "blocks")


@pytest.mark.parametrize("text", ["", "zero", "-1", "0", "nan", "inf"])
def test_a_factor_that_is_none_is_named(text, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, text)
    with pytest.raises(ValueError, match=f"REPLKNET_LIMITS must be a positive number, such as 4, got '{text}'"):
        limits.factor()


def test_a_text_from_a_file_is_one_line_without_control_characters():
    assert shown("cat\n\x1b[31mdog\x07\u202e") == r"cat\n\x1b[31mdog\x07\u202e"
    assert shown(Path("bad-\udcff.png")) == r"bad-\xff.png"
    assert shown("Zürich 日本 é") == "Zürich 日本 é"
    assert shown(3) == "3"
