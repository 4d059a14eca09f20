"""replknet doctor --shape: the choice for one call, explained."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import replknet
from replknet.cli.main import main
from replknet.kernels import BACKENDS, Call, choose, reference, triton_device, triton_tune
from replknet.kernels.triton_plan import PatchTile, Work
from replknet.kernels.triton_tune import Entry, kind_of
from replknet.ops.doctor import explain

LAYER = ["--shape", "1,8,14,14", "--kernel", "13,5"]


def registered(monkeypatch, backend):
    """Put a backend before all others."""
    # the function `replknet.ops.doctor` hides the module of the same name
    for module in ("replknet.kernels", "replknet.ops.doctor"):
        monkeypatch.setattr(sys.modules[module], "BACKENDS", (backend, *BACKENDS))


def test_the_named_backend_is_the_one_that_the_operator_takes(capsys):
    assert main(["doctor", *LAYER, "--channels-last", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    call = Call(shape=(1, 8, 14, 14), kernel=(13, 5), dtype=torch.float32, device="cpu", channels_last=True)
    assert found["call"] == str(call)
    assert found["backend"] == choose(call).name
    assert found["error"] is None
    assert [opinion["name"] for opinion in found["opinions"]] == [backend.name for backend in BACKENDS]


def test_people_read_who_takes_the_call_and_who_must_be_asked_by_name(capsys):
    assert main(["doctor", *LAYER, "--dtype", "float64"]) == 0
    text = capsys.readouterr().out
    assert "x [1, 8, 14, 14] float64 contiguous on cpu, kernel 13x5, algorithm=auto" in text
    assert "aten takes it, the first that neither refuses nor declines" in text
    assert "reference  would take it when asked by name" in text


def test_a_forced_backend_is_said_to_be_forced(capsys):
    with replknet.use_backend("reference"):
        assert main(["doctor", *LAYER]) == 0
    assert "reference takes it, forced by REPLKNET_BACKEND or use_backend" in capsys.readouterr().out


def test_each_gpu_is_shown_with_what_is_known_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H100", "Tesla T4"][index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    caches = triton_tune.table_of, triton_device.device_at
    for cache in caches:
        cache.cache_clear()
    try:
        device = triton_device.device_at(0)
        work = Work(shape=(64, 128, 56, 56), kernel=(31, 31), dtype=torch.bfloat16, device=0)
        device.table.put_check("forward patch bfloat16", "right")
        device.table.put(kind_of("forward", work), Entry(PatchTile(), 0.2578, 7.867))
        device.broken["dw patch bfloat16"] = "RuntimeError: Failed to find C compiler"
        assert main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert (
            "cuda:0: NVIDIA H100 (capability 9.0): right: forward patch bfloat16; not used: dw patch bfloat16: " in text
        )
        assert f"Failed to find C compiler; 1 kinds of calls timed in {device.table.path}" in text
        assert "cuda:1: Tesla T4 (capability 7.5): torch's own convolution; Triton: needs a device of cap" in text
        assert main(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["cuda"][0]["timed"] == 1
        layer = ["--shape", "64,128,56,56", "--kernel", "31", "--dtype", "bfloat16"]
        assert main(["doctor", *layer, "--device", "cuda"]) == 0
        lines = capsys.readouterr().out.splitlines()
        at = next(i for i, line in enumerate(lines) if line.split()[:3] == ["measured", "takes", "it"])
        assert lines[at + 1].split("forward: ")[1] == f"{PatchTile()} 0.258 ms, torch 7.87 ms"
        assert lines[at + 2].split("dx: ")[1].startswith("not timed here; the tile that ships is PatchTile(")
        assert main(["doctor", *layer, "--device", "cuda:1"]) == 0
        assert "aten takes it" in capsys.readouterr().out
        assert main(["doctor", *layer, "--device", "cuda:2"]) == 0
        assert "measured   refuses: there is no device cuda:2" in capsys.readouterr().out
    finally:
        for cache in caches:
            cache.cache_clear()
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:1 and so on, got 'gpu'"):
        explain((1, 8, 14, 14), (13, 5), device="gpu")


def test_a_backend_explains_its_choice(monkeypatch, capsys):
    def explanation(call):
        return [f"fft of length 30 for {call.kernel[0]} taps", "direct would cost 3 times as much"]

    registered(monkeypatch, replace(reference.BACKEND, name="new", automatic=True, explanation=explanation))
    assert main(["doctor", *LAYER]) == 0
    text = capsys.readouterr().out
    assert "  new        takes it\n               fft of length 30 for 13 taps\n               direct would" in text
    assert main(["doctor", *LAYER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["opinions"][0]["explanation"][0].startswith("fft of length 30")


def test_a_refusal_has_its_reason_and_no_explanation(monkeypatch):
    def explanation(call):
        raise AssertionError("asked about a call that it refuses")

    new = replace(reference.BACKEND, name="new", refusal=lambda call: "takes no 5", explanation=explanation)
    registered(monkeypatch, new)
    found = explain((1, 8, 14, 14), (5, 5))
    assert found.opinions[0].refusal == "takes no 5"
    assert "new        refuses: takes no 5" in str(found)
    monkeypatch.setattr("replknet.kernels._forced", "new")
    found = explain((1, 8, 14, 14), (5, 5))
    assert found.backend is None
    assert "error: the forced backend 'new' does not take this call" in str(found)


def test_a_layout_that_is_both_is_read_by_its_strides_as_in_the_operator():
    assert "channels_last" in explain((1, 1, 5, 5), (3, 3), channels_last=True).call
    assert "contiguous" in explain((1, 1, 5, 5), (3, 3), channels_last=False).call
    assert "contiguous" in explain((1, 1, 1, 1), (3, 3), channels_last=True).call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,8,14,14"], "--shape N,C,H,W and --kernel KH[,KW] describe a call together"),
        (["--kernel", "3"], "only one of them was given"),
        (["--shape", "1,8,14", "--kernel", "3"], "--shape must be N,C,H,W, such as 1,128,56,56, got 1,8,14"),
        (["--shape", "1,8,0,14", "--kernel", "3"], "--shape must be N,C,H,W, such as 1,128,56,56, got 1,8,0,14"),
        (["--shape", "1,8,14,14", "--kernel", "3,3,3"], "--kernel must be KH or KH,KW, such as 31 or 51,5, got 3,3,3"),
        (["--shape", "1,8,14,14", "--kernel", "4"], "kernel sides must be odd, got 4x4"),
    ],
)
def test_errors_are_one_line(options, message, capsys):
    assert main(["doctor", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
