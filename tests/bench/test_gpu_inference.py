"""The inference form's program for a GPU, where there is none."""

import torch

from replknet.bench import gpu_inference as gpu
from replknet.bench.gpu_layers import Wrong
from replknet.bench.records import Record
from replknet.timing import quantiles_of


def timer(call):
    call()
    return quantiles_of([1.0, 2.0, 3.0])


def measured():
    return list(gpu.measure("cpu", timer, 2, 64, "replknet_test", compile=False))


def test_every_way_is_checked_and_timed():
    found = measured()
    assert [one.way for one in found] == ["inference form", "merged", "torch"]
    assert {one.backend for one in found} == {"operator", "torch"}
    assert all(0 < one.excess < 1 for one in found), "bfloat16 rounds"


def test_a_wrong_result_gets_no_time(monkeypatch):
    real = gpu.optimize
    monkeypatch.setattr(gpu, "optimize", lambda *a, **k: lambda x: 1.1 * real(*a, **k)(x))
    found = measured()
    assert isinstance(found[0], Wrong)
    assert all(isinstance(one, Record) for one in found[1:])


def test_the_program_writes_and_stops_in_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no CUDA device: nothing was checked\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    records = measured()
    monkeypatch.setattr(gpu, "measure", lambda *a: iter(records))
    assert gpu.main(["--folder", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("inference_h100_")
    assert len(file.read_text().splitlines()) == len(gpu.CASES) * len(records)
    assert gpu.main(["--folder", str(tmp_path), "--limit", "-1"]) == 0
    assert capsys.readouterr().out.count("left out") == len(gpu.CASES)
    monkeypatch.setattr(gpu, "measure", lambda *a: iter([Wrong("way", 0.5)]))
    assert gpu.main(["--folder", str(tmp_path)]) == 1
