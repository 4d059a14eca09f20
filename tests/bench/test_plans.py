"""The plans of the C++ core: every candidate is right, and the chosen ones are those that were timed beside the best.

`replknet bench ops --suite plans` compares them with the clock. No test does: another program would fail it.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from matrix import matrix
from replknet.bench import plans, tables
from replknet.bench.plans import SHAPES, TARGET, compare
from replknet.bench.records import Record
from replknet.kernels import native, reference
from replknet.kernels.native_plan import candidates
from replknet.timing import Timing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = [(name,) for name in SHAPES]
SMALL = [(name,) for name, (h, w, _, _) in SHAPES.items() if h * w <= 56 * 56]


@pytest.fixture(scope="module")
def recorded():
    """Case -> what a plan does and its time as a multiple of the best one's, for each plan in the records."""
    found = defaultdict(list)
    for file in RESULTS.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if record.get("suite") == "plans":
                found[record["case"]].append(record)
    ratios = defaultdict(dict)
    for case, records in found.items():
        # a measurement is two lines: the chosen plan and the best candidate
        for chosen, best in zip(records[::2], records[1::2], strict=True):
            for one in (chosen, best):
                ratios[case][steps(one["way"].split(": ", 1)[1])] = one["timing"]["p20_ms"] / best["timing"]["p20_ms"]
    return ratios


def steps(plan):
    """A plan's text without the estimated time."""
    return str(plan).rsplit(", ", 1)[0]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="needs benchmarks/results, which a source distribution leaves out")
@pytest.mark.parametrize("name", SHAPES)
def test_the_chosen_plan_was_timed_and_is_not_much_slower_than_the_best(name, recorded):
    chosen = steps(candidates(*SHAPES[name])[0])
    again = f"replknet bench ops --suite plans --case {name} --output benchmarks/results/ops.jsonl"
    assert chosen in recorded[name], f"{chosen} has no record; `{again}` makes one"
    assert recorded[name][chosen] <= TARGET, f"{chosen}: {recorded[name]}"


@pytest.mark.parametrize("name", matrix(NAMES, SMALL))
def test_every_candidate_computes_the_convolution(name):
    h, w, kh, kw = SHAPES[name]
    x = torch.randn(1, 16, h, w).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, kh, kw)
    truth = reference.forward(x.double(), weight.double(), None, False)
    for plan in candidates(h, w, kh, kw):
        y = torch.empty_like(x)
        native.run_plan(plan, x, weight, y)
        assert (y.double() - truth).norm() < 1e-6 * truth.norm(), plan


@pytest.fixture
def timed(monkeypatch):
    """The calls that a comparison asks for; the first takes 3 ms, the second 1 ms, the others 2 ms."""
    found = {}

    def interleaved(calls, runs):
        found.update(calls)
        times = [3.0, 1.0, *[2.0] * len(calls)]
        return {name: Timing(ms, ms, ms, runs) for name, ms in zip(calls, times, strict=False)}

    monkeypatch.setattr(plans, "interleaved", interleaved)
    return found


def test_the_chosen_plan_is_compared_with_candidates_that_have_a_chance(timed):
    shape = SHAPES["plan.40x40.k13x13"]
    everything = candidates(*shape)
    found = compare(*shape, runs=2)
    assert found.chosen == everything[0]
    assert found.best == everything[1]
    assert found.ratio == 3
    assert 2 < len(timed) < len(everything)
    assert max(plan.ns for plan in found.times) <= 4 * found.chosen.ns


def test_a_plan_that_is_too_slow_is_said_with_the_better_one(timed):
    name = "plan.40x40.k13x13"
    (records,) = plans.measure([name], runs=2)
    assert all(isinstance(record, Record) for record in records)
    best = candidates(*SHAPES[name])[1]
    lines = tables.plan_rows(records)
    assert lines[0].split()[:3] == [name, "3000.0", "3.00"]
    assert lines[1].strip() == f"best: {best}"
    assert lines[2].strip() == "at most 1.3: missed"
