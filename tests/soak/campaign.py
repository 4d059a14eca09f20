"""What a campaign is: random cases, each drawn from its seed alone, so that a failure is repeated by its number."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Campaign:
    """One kind of random case."""

    name: str
    question: str
    # draws a case, and does it; what is wrong with it, or None
    check: Callable[[Random], str | None]


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that went wrong; `str()` says how to repeat it."""

    campaign: str
    seed: int
    what: str

    def __str__(self) -> str:
        again = f"PYTHONPATH=tests .venv/bin/python -m soak {self.campaign} --first {self.seed} --cases 1"
        return f"{self.what}\n  again: {again}"


def failures(campaign: Campaign, first: int, cases: int, until: float = float("inf")) -> Iterator[Failure | None]:
    """For each case in turn what failed, or None; it ends after so many cases, or at a time of `time.monotonic()`."""
    for seed in range(first, first + cases):
        if time.monotonic() >= until:
            return
        # the name is part of the seed: campaigns draw different cases
        what = campaign.check(Random(f"{campaign.name} {seed}"))
        yield None if what is None else Failure(campaign.name, seed, what)
