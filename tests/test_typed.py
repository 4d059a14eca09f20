"""Values from JSON files fit the dataclass that they are for, or say what was expected."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from replknet.typed import typed


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    sides: tuple[int, ...] = (3,)
    pair: tuple[int, int] | None = None
    colours: tuple[tuple[int, int, int], ...] = ()
    share: float = 0.5
    merged: bool = False
    form: Literal["a", "b"] = "a"
    options: dict[str, Any] | None = None


def test_lists_become_tuples_to_any_depth_and_the_rest_stays():
    fields = {
        "name": "x",
        "sides": [31, 29],
        "pair": [1, 2],
        "colours": [[1, 2, 3]],
        "share": 1,
        "merged": True,
        "form": "b",
        "options": {"kernels": [5]},
    }
    expected = {**fields, "sides": (31, 29), "pair": (1, 2), "colours": ((1, 2, 3),)}
    assert typed(Record, fields) == expected
    assert typed(Record, {"name": "x", "pair": None, "options": None}) == {"name": "x", "pair": None, "options": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "name in the card must be a text, got 3"),
        ({"name": "x", "sides": "31"}, "sides in the card must be a list of whole numbers, got '31'"),
        ({"name": "x", "sides": [3.5]}, r"sides in the card must be a list of whole numbers, got \[3.5\]"),
        ({"name": "x", "sides": [True]}, "sides in the card must be a list of whole numbers"),
        ({"name": "x", "pair": [1, 2, 3]}, "pair in the card must be a list of 2 whole numbers or null"),
        ({"name": "x", "colours": [[1, 2]]}, "colours in the card must be a list of lists"),
        ({"name": "x", "share": float("nan")}, "share in the card must be a number, got nan"),
        ({"name": "x", "share": 10**400}, "share in the card must be a number, got 1000"),
        ({"name": "x", "merged": 1}, "merged in the card must be true or false, got 1"),
        ({"name": "x", "form": "c"}, "form in the card must be one of a, b, got 'c'"),
        ({"name": "x", "form": ["a"]}, "form in the card must be one of a, b"),
        ({"name": "x", "options": [1]}, "options in the card must be an object or null"),
        ({"name": "x", "extra\x1b": 1}, r"the card has the unknown field extra\\x1b; known are name"),
        ({}, "the card lacks the field name"),
    ],
)
def test_a_wrong_value_says_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(Record, fields, "the card")
