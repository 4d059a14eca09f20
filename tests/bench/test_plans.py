"""The cost model of the C++ core against the clock."""

import pytest

from replknet.bench.plans import SHAPES, TARGET, compare

# those of the suite `plans` that take a moment; all of them run with --full
QUICK = [name for name, (h, w, _, _) in SHAPES.items() if h * w <= 1024]


@pytest.mark.parametrize("name", SHAPES)
def test_no_candidate_is_much_faster_than_the_chosen_plan(name, request):
    if name not in QUICK and not request.config.getoption("--full"):
        pytest.skip("of the full matrix, which `make test-all` runs")
    ratios = []
    # another program may have taken the processor
    while not ratios or (ratios[-1] > TARGET and len(ratios) < 4):
        found = compare(*SHAPES[name], runs=8)
        ratios.append(found.ratio)
    assert min(ratios) <= TARGET, f"{found.chosen}, but {found.best} is faster: {ratios}"
