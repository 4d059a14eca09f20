"""What the experiments of costs say of times and sizes that are made up, and of the paper's sizes that are counted."""

import json

import pytest
from matplotlib import pyplot as plt

from replknet.bench.rivals import MODES, RIVALS
from replknet.bench.stacks import KERNELS
from replknet.explore import program
from replknet.explore.experiment import Results, Run, Site


def results(figures):
    where = {"device": "some CPU", "threads": 2}
    return Results(
        tuple(Run(arm=arm, key="", seed=0, figures=f, seconds=1.0, provenance=where) for arm, f in figures.items())
    )


def timed(ms):
    return {"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "runs": 3}


def test_speed_takes_the_better_layout_of_each():
    experiment = program.EXPERIMENTS["speed"]("small")
    times = [
        {"kernel": k, "way": way, "timing": timed(factor * (1 + k))}
        for k in KERNELS
        for way, factor in (("operator nhwc", 1), ("operator nchw", 3), ("torch nhwc", k), ("torch nchw", k / 2))
    ]
    found = results({"16x16": {"times": times, "wrong": []}})
    faster, cheap, *others = (claim.ours(found) for claim in experiment.claims)
    # torch's 31x31 takes 31 / 2 * 32 ms, the operator's 32
    assert (faster.text, faster.verdict) == ("15.5 times", "agrees")
    assert (cheap.text, cheap.verdict) == ("8.0 times (83 with torch's)", "agrees")
    assert others == [None] * 4
    head, *rows = experiment.table(found)
    assert len({len(row) for row in (head, *rows)}) == 1
    assert rows[-1][:5] == ["31x31", "36.28", "32.0", "496.0", "15.5"]
    assert rows[-1][5] == "20.4", "the paper's 171.4 / 8.4 ms"
    plt.close(experiment.draw(found))


def test_rivals_are_compared_with_swin_and_stand_beside_the_papers_accuracies():
    experiment = program.EXPERIMENTS["rivals"]("small")
    memory = {"program_bytes": 10**8, "loaded_bytes": 4 * 10**8, "peak_bytes": 5 * 10**8}
    networks = {
        name: {
            "parameters": 79_390_000,
            "multiply_adds": 15_354_000_000,
            "timings": {"nhwc": timed(300.0 if name == "Swin-B" else 200.0), "nchw": timed(900.0)},
            "layout": "nhwc",
            "memory": None if name == "ResNet-101" else memory,
            "size": MODES["classifier 224"].size,
        }
        for name in RIVALS
    }
    found = results({"classifier 224": {"networks": networks}})
    finding, *others = (claim.ours(found) for claim in experiment.claims)
    assert (finding.text, finding.verdict) == ("1.50 times as fast", "agrees")
    assert others == [None, None]
    rows = {row[1]: row for row in experiment.table(found)[1:]}
    assert rows["RepLKNet-31B"][2:] == ["79.4", "15.4", "200", "nhwc", "300 + 100", "83.5 % of ImageNet"]
    assert rows["ResNet-101"][6:] == ["-", "-"]
    plt.close(experiment.draw(found))


@pytest.mark.full
def test_the_family_is_counted_as_the_paper_counts(tmp_path):
    site = Site(output=tmp_path)
    program.run(program.chosen("small", ["family/13-*", "family/31-*"]), site)
    content = json.loads((tmp_path / "family.json").read_text())
    small, large = (run["figures"] for run in content["runs"])
    assert large["parameters"] == 79_527_272
    assert large["multiply_adds"] == pytest.approx(15.354e9, rel=1e-4)
    assert large["upernet_parameters"] == 111_816_214
    assert round(100 * (large["upernet_parameters"] / small["upernet_parameters"] - 1), 2) == 5.38
    texts = [claim["ours"]["text"] for claim in content["claims"]]
    assert texts[0] == "+5.38 %, from 106.11 to 111.82 M"
    assert [claim["ours"]["verdict"] for claim in content["claims"]] == ["agrees", "agrees"]
