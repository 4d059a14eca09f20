"""The checks on a GPU, where there is none."""

from dataclasses import replace

import pytest
import torch

from replknet.bench import gpu, gpu_layers, gpu_networks, gpu_tiles
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


@pytest.fixture
def _precision():
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    yield
    setting.fp32_precision = before


@pytest.mark.usefixtures("_precision")
def test_the_program_measures_writes_and_sums_up(monkeypatch, tmp_path, capsys):
    layers = measured()
    wrong = gpu_layers.Wrong("new", 0.5)
    asked = []

    def measure(theme):
        def run(*args):
            asked.append(theme)
            return iter(layers if theme != "tiles" else [layers[0], wrong])

        return run

    for module, theme in ((gpu_layers, "layers"), (gpu_networks, "networks"), (gpu_tiles, "tiles")):
        monkeypatch.setattr(module, "measure", measure(theme))
    monkeypatch.setattr(gpu, "compile_all", lambda: asked.append("compile"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("REPLKNET_AUTOTUNE", "1")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    # a result that is wrong makes it fail
    assert gpu.main(["--folder", str(tmp_path)]) == 1
    n = len(gpu_layers.CASES)
    assert asked == ["compile", *["layers"] * 10, "networks", *["tiles"] * 7, *["layers"] * (3 * n - 10)]
    lines = {path.name.split("_")[0]: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert lines == {"layers": 3 * n * len(layers), "networks": len(layers), "tiles": 7}
    assert all(path.name.split("_")[1] == "h200" for path in tmp_path.iterdir())
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("NVIDIA H200, torch ")
    assert "WRONG: new by 5.0e-01" in out
    assert gpu.main(["--folder", str(tmp_path), "--limit", "0"]) == 0
    assert "left out after 0 s: 31b.56.n64 bfloat16, " in capsys.readouterr().out


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
