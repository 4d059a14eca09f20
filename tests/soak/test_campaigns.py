"""The cases of each campaign, of which the first always run, and that a wrong result is found and can be repeated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from matrix import matrix
from replknet.kernels import native
from soak import CAMPAIGNS, depthwise
from soak import __main__ as command
from soak.campaign import failures

# as many as `make soak` has by itself
CASES, AT_ONCE = 500, 50
FIRSTS = [(first,) for first in range(0, CASES, AT_ONCE)]


@pytest.mark.parametrize("first", matrix(FIRSTS, FIRSTS[:1]))
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_case_fails(name, first):
    found = [failure for failure in failures(CAMPAIGNS[name], first, AT_ONCE) if failure is not None]
    assert not found, "\n".join(map(str, found))


def test_a_wrong_result_is_found_and_its_seed_repeats_it(monkeypatch):
    original = native._convolved

    def wrong(job, x, weight, bias, relu, y):
        code = original(job, x, weight, bias, relu, y)
        y[..., -1, -1] *= 1 + 1e-2
        return code

    monkeypatch.setattr(native, "_convolved", wrong)
    found = [failure for failure in failures(CAMPAIGNS["depthwise"], 0, 5) if failure is not None]
    assert found
    assert "times the error that arithmetic allows" in found[0].what
    (again,) = failures(CAMPAIGNS["depthwise"], found[0].seed, 1)
    assert again == found[0]
    assert str(again).endswith(f"depthwise --first {found[0].seed} --cases 1")


def test_cases_are_of_many_kinds():
    shapes = [depthwise._shape(Random(i)) for i in range(300)]
    assert any(kh > 2 * h for _, _, h, _, kh, _ in shapes)
    assert any(kh != kw for *_, kh, kw in shapes)
    assert len({c % 16 for _, c, *_ in shapes}) == 16


def test_the_command_counts_cases():
    tests = Path(__file__).parents[1]
    words = [sys.executable, "-m", "soak", "depthwise", "--cases", "3", "--first", "7", "--json"]
    result = subprocess.run(
        words, cwd=tests, env={**os.environ, "PYTHONPATH": str(tests)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["cases"], found["first"], found["failures"]) == (3, 7, [])


def test_an_unknown_campaign_is_an_error_that_names_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "files"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "no campaign is called files; there are depthwise" in capsys.readouterr().err


def test_minutes_end_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak", "depthwise", "--minutes", "0.01"])
    assert command.main() == 0
    assert "depthwise: " in capsys.readouterr().out
