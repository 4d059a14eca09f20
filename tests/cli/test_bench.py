"""replknet bench as a person types it, on cases that take milliseconds."""

import json
import sys

import pytest
import torch
from PIL import Image

from replknet.bench import cases
from replknet.bench.cases import Case, Suite
from replknet.cli.main import main


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Small suites in place of the large ones, under the same names."""
    table = tuple(Case(f"table1.n1.r8.k{k}", (1, 8, 8, 8), k) for k in (3, 31))
    grid = (Case("grid.a", (1, 32, 6, 6), 7),)
    layers = (Case("31b.stage1", (1, 16, 7, 7), 13), Case("31b.stage2", (1, 16, 5, 5), 5))
    small = {"table1": table, "grid": grid, "layers": layers, "small": layers, "training": layers}
    for name, suite in list(cases.SUITES.items()):
        monkeypatch.setitem(cases.SUITES, name, Suite(suite.question, small[name], suite.whats, suite.runtimes))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SHORT = ["--runs", "2", "--peak", "100"]


def test_no_subject_and_no_suite_time_the_layers(capsys):
    assert main(["bench", *SHORT]) == 0
    text = capsys.readouterr().out
    assert text.startswith("layers: how fast are the layers of RepLKNet-31B?\n")
    assert "31b.stage2 forward\n  torch nhwc " in text
    assert "gradients" not in text
    assert "of peak: 100 GFLOP/s, as stated" in text


def test_records_are_appended(tmp_path, capsys):
    file = tmp_path / "results" / "r.jsonl"
    command = ["bench", "ops", "--case", "31b.stage2", "--backward", "--threads", "1", *SHORT, "--output", str(file)]
    assert main(command) == 0
    first = file.read_text()
    assert main(command) == 0
    assert file.read_text().startswith(first)
    records = [json.loads(line) for line in first.splitlines()]
    assert {(record["case"], record["what"]) for record in records} == {
        ("31b.stage2", "forward"),
        ("31b.stage2", "gradients"),
    }
    assert {record["threads"] for record in records} == {1}
    assert {record["peak_from"] for record in records} == {"as stated"}


def test_json_prints_the_records_alone(capsys):
    assert main(["bench", "ops", "--suite", "grid", "--json", *SHORT]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["way"] for record in records} >= {"operator nhwc", "torch nchw"}


def test_table1_draws_time_against_kernel_size(tmp_path, capsys):
    picture = tmp_path / "t.png"
    assert main(["bench", "ops", "--suite", "table1", "--backward", "--plot", str(picture), *SHORT]) == 0
    assert Image.open(picture).format == "PNG"
    text = capsys.readouterr().out
    assert "31x31 of the operator takes" in text
    assert text.endswith(f"{picture}\n")


def test_the_grid_ends_with_its_worst_cases(capsys):
    assert main(["bench", "ops", "--suite", "grid", *SHORT]) == 0
    assert "slower than torch's better layout by more than 5 %" in capsys.readouterr().out


def test_training_times_gradients_and_steps(capsys):
    assert main(["bench", "ops", "--suite", "training", "--case", "31b.stage1", *SHORT]) == 0
    text = capsys.readouterr().out
    assert "31b.stage1 gradients\n" in text
    assert "31b.stage1 step\n" in text
    assert "forward\n" not in text


def test_overhead_is_in_microseconds(capsys):
    assert main(["bench", "ops", "--suite", "overhead", "--case", "*.k3", "--runs", "2"]) == 0
    text = capsys.readouterr().out
    assert "beyond torch" in text
    assert "overhead.k3  forward, recorded operator nhwc" in text
    assert "overhead.k5" not in text


def test_only_some_ways(capsys):
    assert main(["bench", "ops", "--case", "31b.stage2", "--way", "operator *", "--json", *SHORT]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["way"] for record in records] == ["operator nhwc", "operator nchw"]
    assert main(["bench", "ops", "--case", "31b.stage2", "--way", "mkl", *SHORT]) == 2
    assert (
        "no way of 31b.stage2 is called mkl; there are torch nhwc, torch nchw, operator nhwc" in capsys.readouterr().err
    )


def test_plans_are_compared_with_the_best_candidate(capsys):
    assert main(["bench", "ops", "--suite", "plans", "--case", "plan.7x7.k7x7", "--runs", "2"]) == 0
    assert "chosen: direct: tiles of 7x7 outputs" in capsys.readouterr().out


def test_a_wrong_result_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("replknet.bench.ops.excess", lambda expected, found: 3.0)
    assert main(["bench", "ops", "--case", "31b.stage2", *SHORT]) == 1
    assert "operator nhwc   wrong by 3 times the bound, not timed" in capsys.readouterr().out


def test_list_times_nothing(capsys):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "overhead: what does a call cost beyond torch's own?" in lines
    assert "  table1.n1.r8.k31" in lines
    assert "  31b.step" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "nothing"], "no case is called nothing; --list shows every case"),
        (["--suite", "networks", "--case", "x"], "no case of networks is called x; there are convnext_tiny.forward,"),
        (["--suite", "overhead", "--backward"], "--backward is for layers; the suite overhead has its own directions"),
        (["--suite", "plans", "--way", "torch *"], "--way is for layers; the suite plans has its own ways"),
        (["--suite", "grid", "--plot", "x.png"], "--plot draws time against kernel size: it needs --suite table1"),
        (["--runs", "1"], "--runs must be at least 2, so that there are quantiles, got 1"),
    ],
)
def test_errors_are_one_line(options, message, capsys):
    assert main(["bench", "ops", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_suite_gets_the_list(capsys):
    assert main(["bench", "ops", "--suite", "table2"]) == 2
    assert "table1" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_missed_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("replknet.analysis.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("replknet.analysis.plots", raising=False)
    assert main(["bench", "ops", "--suite", "table1", "--plot", "x.png"]) == 2
    captured = capsys.readouterr()
    assert 'pip install ".[viz]"' in captured.err
    assert captured.out == ""
