"""Which cases of a matrix run in `make test`, and which in `make test-all` alone."""

from collections.abc import Iterable
from typing import Any

import pytest

FULL = pytest.mark.full


def matrix(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """Parameters for parametrize, a value or a tuple a case: `always` runs in `make test`, all in the full matrix."""
    every, kept = [_values(case) for case in cases], [_values(case) for case in always]
    assert kept, "a contract has a case that always runs"
    unknown = [case for case in kept if case not in every]
    assert not unknown, f"not in the matrix: {unknown}"
    return [pytest.param(*case, marks=[] if case in kept else [FULL]) for case in every]


def _values(case: Any) -> tuple[Any, ...]:
    return tuple(case) if isinstance(case, tuple | list) else (case,)
