"""Layers on a GPU, where there is none: ways, times and tables."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from replknet.bench import gpu_layers
from replknet.bench.cases import Case
from replknet.bench.records import Record
from replknet.kernels import BACKENDS, reference
from replknet.timing import Timing, quantiles_of

TINY = Case("tiny", (2, 9, 6, 5), 7)
ONE_IMAGE = Case("one", (1, 9, 6, 5), 7)
# the device's times are 1 to 3 ms, and with launches 5
EAGER = quantiles_of([5.0, 5.0])


def timer(call):
    call()
    return quantiles_of([1.0, 2.0, 3.0])


TIMERS = gpu_layers.Timers(timer, timer, lambda call: EAGER)


def measured(case=TINY, timers=TIMERS):
    return list(gpu_layers.measure(case, torch.float32, "cpu", timers))


@pytest.fixture
def calls_ms(monkeypatch):
    """Each call and each replay of a graph takes as many milliseconds as it returns."""

    class Graph:
        def replay(self):
            return 1.0

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Graph)
    Graph.wait_stream = lambda self, other: None
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_layers, "_device_ms", lambda call: call())


@pytest.mark.usefixtures("calls_ms")
@pytest.mark.parametrize(("limit", "expected", "calls"), [(20.0, 30.0, 2), (40.0, 1.0, 3)])
def test_a_call_above_the_limit_is_timed_once_and_without_a_graph(limit, expected, calls):
    made = []
    found = gpu_layers.device_time(lambda: made.append(None) or 30.0, limit_ms=limit)
    assert found.p50_ms == expected
    assert (found.runs == 1) == (expected == 30.0)
    assert len(made) == calls


def test_eager_time_is_that_of_many_calls_and_one_wait(monkeypatch):
    clock = [0.0]

    def wait():
        events.append("wait")
        clock[0] += 0.1

    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(gpu_layers.time, "perf_counter", lambda: clock[0])
    found = gpu_layers.eager_time(lambda: events.append("call"))
    assert events[:23] == ["call", "wait", *["call"] * 20, "wait"]
    assert found.p50_ms == pytest.approx(100 / 20)
    assert found.runs == 10


@pytest.mark.parametrize(("kernel", "expected"), [(7, True), (9, False)])
def test_cudnn_tries_its_algorithms_for_small_kernels_alone(monkeypatch, kernel, expected):
    seen = set()
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        timers = gpu_layers.Timers(timer, lambda call: seen.add(torch.backends.cudnn.benchmark) or EAGER, timer)
        for _ in gpu_layers.measure(Case("", (2, 3, 9, 9), kernel), torch.float32, "cpu", timers):
            assert torch.backends.cudnn.benchmark == before
    assert seen == {expected}


def test_every_way_is_checked_and_timed_forward_and_backward():
    found = measured()
    assert all(isinstance(one, Record) for one in found)
    ways = {(one.way, one.what) for one in found}
    # the native kernel stands for the Triton kernels, which take no call here
    assert ways == {
        (f"{who} {layout}", what)
        for who in ("torch", "native")
        for layout in ("nchw", "nhwc")
        for what in ("forward", "step")
    }
    lines = gpu_layers.rows(TINY, torch.float32, found)
    assert len(lines) == 1 + len(found)
    assert "1.00 x torch's better layout" in lines[1]
    assert "of the memory's rate" in lines[1]


def test_one_image_is_timed_with_its_launches_too():
    found = measured(ONE_IMAGE)
    assert [one.what for one in found if one.way == "native nhwc"] == [
        "forward",
        "forward, eager",
        "step",
        "step, eager",
    ]
    eager = [one for one in found if one.what.endswith("eager")]
    assert all(one.timing == EAGER for one in eager)
    assert {one.flops for one in eager} == {one.flops for one in found}
    lines = gpu_layers.rows(TINY, torch.float32, found)
    assert sum("forward, eager     5000.0 us     1.00 x torch's better layout" in line for line in lines) == 4
    assert sum("of the memory's rate" in line for line in lines) == 4


def test_a_call_that_was_timed_once_is_said_to_be_so():
    long = Timing(30.0, 30.0, 30.0, runs=1)
    found = measured(ONE_IMAGE, timers=replace(TIMERS, torch=lambda call: long))
    # its launches do not matter
    assert {one.what for one in found if one.backend == "torch"} == {"forward", "step"}
    lines = gpu_layers.rows(TINY, torch.float32, found)
    assert [line.endswith(", one call") for line in lines[1:]] == [one.backend == "torch" for one in found]


def test_the_choice_by_times_is_no_way_of_its_own(monkeypatch):
    measured_too = replace(reference.BACKEND, name="measured")
    monkeypatch.setattr(gpu_layers, "BACKENDS", (measured_too, *BACKENDS))
    assert {one.backend for one in measured()} == {"torch", "native"}


def test_everything_that_is_measured_is_compiled_before(monkeypatch):
    calls = []

    def forward(x, *rest):
        calls.append(x.is_contiguous())
        return reference.forward(x, *rest[:3])

    def backward(dy, x, weight, wanted, algorithm):
        calls.append(dy.is_contiguous() == x.is_contiguous())
        return reference.backward(dy, x, weight, wanted)

    new = replace(reference.BACKEND, name="new", forward=forward, backward=backward)
    monkeypatch.setattr(gpu_layers, "BACKENDS", (new,))
    gpu_layers.compile_case(TINY, torch.float32, "cpu")
    assert calls == [True, True, False, True]


def test_a_wrong_result_gets_no_time(monkeypatch):
    def backward(dy, x, weight, wanted, algorithm):
        dx, dw, _ = reference.backward(dy, x, weight, wanted)
        dw[-1] += 0.1
        return dx, dw, None

    wrong = replace(reference.BACKEND, name="new", backward=backward)
    monkeypatch.setattr(gpu_layers, "BACKENDS", (wrong, *BACKENDS))
    found = measured()
    assert {one.way for one in found if isinstance(one, gpu_layers.Wrong)} == {"new nchw", "new nhwc"}
    assert any("WRONG" in line for line in gpu_layers.rows(TINY, torch.float32, found))


def test_the_headline_compares_the_fastest_of_both_kernels():
    record = next(one for one in measured() if isinstance(one, Record))
    records = [
        replace(record, case=f"table1.r16.k{k}", way=way, what="forward", timing=quantiles_of([ms, ms]))
        for k, way, ms in ((31, "torch nchw", 90.0), (31, "triton nchw", 3.0), (3, "torch nhwc", 2.0), (7, "x", 1.0))
    ]
    assert gpu_layers.headline(records) == ["gpu.float32 table1.r16.k31: triton nchw takes 1.50 times torch nhwc's 3x3"]
    assert gpu_layers.headline(records[:2]) == []


def test_the_summary_has_a_line_a_case_with_both_ratios_and_one_for_eager_times():
    record = next(one for one in measured() if isinstance(one, Record))
    records = [
        replace(record, case="a", backend=who, what=what, timing=quantiles_of([ms, ms]))
        for who, what, ms in (
            ("torch", "forward", 9.0),
            ("torch", "forward", 8.0),
            ("triton", "forward", 2.0),
            ("torch", "step", 30.0),
            ("torch", "step, eager", 40.0),
            ("triton", "step, eager", 20.0),
        )
    ]
    _, line, eager = gpu_layers.summary(records)
    assert line.split() == ["a", "float32", "2000.0", "8000.0", "4.00", "-", "30000.0", "-"]
    assert eager.split() == ["a", "float32,", "eager", "-", "-", "-", "20000.0", "40000.0", "2.00"]
