"""Times that can be compared: turns, warm-up, and what else the machine did. The clock is made up."""

from functools import partial

import torch

from replknet import timing
from replknet.timing import Load, interleaved


def test_short_calls_are_settled_and_slow_ones_sit_out(monkeypatch):
    counts = {"fast": 0, "slow": 0}

    def call(name):
        counts[name] += 1

    durations = {"fast": 1.0, "slow": 500.0}
    monkeypatch.setattr(timing, "milliseconds", lambda f: (f(), durations[f.args[0]])[1])
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = {name: partial(call, name) for name in counts}
    times = interleaved(calls, runs=5, limit_s=2.5)
    assert (times["fast"].runs, times["slow"].runs) == (3, 3)
    # the clock jumps a second a look, so a turn is one call; each fast one twice, the slow one warmed up once
    assert counts == {"fast": 6, "slow": 4}
    assert times["slow"].p50_ms == 500


def test_calls_with_threads_of_their_own_come_first_with_pauses_around(monkeypatch):
    log = []
    monkeypatch.setattr(timing.time, "sleep", lambda s: log.append(s))
    calls = {name: partial(log.append, name) for name in ("a", "other", "b")}
    monkeypatch.setattr(timing, "_TURN_S", 0)
    times = interleaved(calls, runs=2, apart=["other"])
    turns = [key for i, key in enumerate(log) if i == 0 or log[i - 1] != key]
    assert turns == [0.02, "other", 0.02, "a", "b"] * 2
    assert list(times) == ["a", "other", "b"]


def test_the_load_of_others_is_not_ours():
    load = Load()
    torch.randn(300, 300) @ torch.randn(300, 300)
    found = load.end()
    assert found["others"] is None or found["others"] >= 0
