"""Which cases of a matrix run in `make test`, and which in `make test-all` alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

FULL = pytest.mark.full


def matrix(cases: Iterable[Sequence[Any]], always: Iterable[Sequence[Any]]) -> list[Any]:
    """Parameters for parametrize, a tuple a case: `always` runs in `make test`, all of them in the full matrix."""
    cases, always = [tuple(case) for case in cases], [tuple(case) for case in always]
    assert always, "a contract has a case that always runs"
    unknown = [case for case in always if case not in cases]
    assert not unknown, f"not in the matrix: {unknown}"
    return [pytest.param(*case, marks=[] if case in always else [FULL]) for case in cases]
