"""The checks on a GPU, where there is none."""

from dataclasses import replace

import torch

from replknet.bench import gpu, gpu_layers, gpu_networks
from replknet.bench.cases import Case
from replknet.bench.harness import Record, quantiles_of
from replknet.kernels import BACKENDS, reference

TINY = Case("tiny", (2, 9, 6, 5), 7)


def timer(call):
    call()
    return quantiles_of([1.0, 2.0, 3.0])


def measured(dtype=torch.float32):
    return list(gpu_layers.measure(TINY, dtype, "cpu", timer))


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
    lines = gpu_layers.rows(TINY, torch.float32, found)
    assert len(lines) == 1 + len(found)
    assert "1.00 x torch's better layout" in lines[1]
    assert "of the floor" in lines[1]


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


def test_the_summary_has_a_line_a_case_with_both_ratios():
    record = next(one for one in measured() if isinstance(one, Record))
    records = [
        replace(record, case="a", backend=who, what=what, timing=quantiles_of([ms, ms]))
        for who, what, ms in (
            ("torch", "forward", 9.0),
            ("compile", "forward", 8.0),
            ("triton", "forward", 2.0),
            ("torch", "step", 30.0),
        )
    ]
    _, line = gpu_layers.summary(records)
    assert line.split() == ["a", "float32", "2000.0", "8000.0", "4.00", "-", "30000.0", "-"]


def test_records_are_named_by_device_and_day(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "nvidia-geforce-rtx-4090",
    }
    for name, short in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(gpu.time, "strftime", lambda _: "2026-11-24")
        assert gpu.file_name("layers") == f"layers_{short}_2026-11-24.jsonl"


def test_networks_are_compared_before_they_are_timed():
    found = list(gpu_networks.measure("cpu", timer, "replknet_nano", 32, (2, 3), ("native", "aten")))
    assert [(one.what, one.way, one.shape[0]) for one in found] == [
        (what, f"{backend} {layout}", n)
        for layout in ("nhwc", "nchw")
        for backend in ("native", "aten")
        for what, n in (("inference", 2), ("training step", 3))
    ]
    lines = gpu_networks.rows(found)
    assert "1.00 x the fastest of the other" in lines[0]
    assert "1000.0 images/s" in lines[0]


def test_the_cases_are_named_once():
    names = [case.name for case in gpu_layers.CASES]
    assert len(set(names)) == len(names)
