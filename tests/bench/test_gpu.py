"""The checks on a GPU, where there is none."""

from dataclasses import replace

import torch

from replknet.bench import gpu
from replknet.bench.cases import Case
from replknet.bench.harness import Record, quantiles_of
from replknet.kernels import BACKENDS, reference

TINY = Case("tiny", (2, 9, 6, 5), 7)


def measured(dtype=torch.float32):
    def timer(call):
        call()
        return quantiles_of([1.0, 2.0, 3.0])

    return list(gpu.measure(TINY, dtype, "cpu", timer))


def test_without_a_cuda_device_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no CUDA device: nothing was checked\n"


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
    lines = gpu.rows(TINY, torch.float32, found)
    assert len(lines) == 1 + len(found)
    assert "1.00 x torch's better layout" in lines[1]
    assert "of the floor" in lines[1]


def test_a_wrong_result_gets_no_time(monkeypatch):
    def backward(dy, x, weight, wanted, algorithm):
        dx, dw, _ = reference.backward(dy, x, weight, wanted)
        dw[-1] += 0.1
        return dx, dw, None

    wrong = replace(reference.BACKEND, name="new", backward=backward)
    monkeypatch.setattr(gpu, "BACKENDS", (wrong, *BACKENDS))
    found = measured()
    assert {one.way for one in found if isinstance(one, gpu.Wrong)} == {"new nchw", "new nhwc"}
    assert any("WRONG" in line for line in gpu.rows(TINY, torch.float32, found))


def test_the_headline_compares_the_fastest_of_both_kernels():
    record = next(one for one in measured() if isinstance(one, Record))
    records = [
        replace(record, case=f"table1.r16.k{k}", way=way, what="forward", timing=quantiles_of([ms, ms]))
        for k, way, ms in ((31, "torch nchw", 90.0), (31, "triton nchw", 3.0), (3, "torch nhwc", 2.0), (7, "x", 1.0))
    ]
    assert gpu.headline(records) == ["gpu.float32 table1.r16.k31: triton nchw takes 1.50 times torch nhwc's 3x3"]
    assert gpu.headline(records[:2]) == []


def test_the_cases_are_named_once():
    names = [case.name for case in gpu.CASES]
    assert len(set(names)) == len(names)
