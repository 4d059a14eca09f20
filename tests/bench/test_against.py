"""The comparison with torch and other runtimes: every way computes the same, and is named, timed and weighed."""

import json
import platform

import pytest
import timm
import torch

from matrix import FULL, matrix
from replknet.analysis.cost import cost
from replknet.bench import against
from replknet.bench.against import OURS, compare
from replknet.bench.parts import parts
from replknet.cli.main import main
from replknet.deploy.inference import optimize
from replknet.nn import merge

WAYS = [OURS, "merged", "torch channels_last", "torch contiguous", "onnxruntime", "openvino"]


def network(num_classes=7, **options):
    return timm.create_model("replknet_test", num_classes=num_classes, **options).eval()


def test_every_way_is_timed_and_computes_the_same():
    found = compare("test", network(), torch.randn(2, 3, 64, 96), runs=2)
    assert [row.way for row in found.rows] == WAYS
    assert (found.network, found.shape, found.dtype) == ("test", (2, 3, 64, 96), "float32")
    for row in found.rows:
        assert row.ratio == pytest.approx(row.timing.p50_ms / found.rows[0].timing.p50_ms, abs=1e-3)
        assert 0 <= row.difference < 1e-5
        assert row.memory is None
    assert {"device", "threads", "versions", "commit"} <= set(found.provenance)


def test_features_and_bfloat16():
    found = compare("test", network(num_classes=0, global_pool=""), torch.randn(1, 3, 64, 64), ["merged"], runs=2)
    assert [row.way for row in found.rows] == [OURS, "merged"]
    backbone = timm.create_model("replknet_test", features_only=True).eval()
    found = compare("test", backbone, torch.randn(1, 3, 64, 64), ["openvino"], dtype=torch.bfloat16, runs=2)
    assert 1e-4 < found.rows[0].difference < 5e-2, "bfloat16 rounds"


@pytest.mark.full
@pytest.mark.skipif(platform.system() != "Linux", reason="no other system tells")
def test_memory_is_of_a_process_of_its_own():
    merged, x = merge(network()), torch.randn(1, 3, 256, 256)
    memory = against.peak(merged, x, OURS, torch.float32, None)
    # what a layer of 128x128 pixels and 8 channels takes, twice
    assert memory.peak - memory.held >= 2 * 4 * 8 * 128**2
    assert memory.held > sum(p.nbytes for p in merged.parameters())


@FULL
@pytest.mark.skipif(platform.system() != "Linux", reason="no other system tells")
def test_a_process_that_fails_is_an_error_with_its_last_words():
    merged, x = merge(network()), torch.randn(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match="ended with 1, not 0: KeyError"):
        against.peak(merged, x, "nobody's way", torch.float32, None)


def test_what_is_wrong_is_not_timed(monkeypatch):
    real = against._torch
    monkeypatch.setattr(against, "_torch", lambda *arguments: lambda: 1.001 * real(*arguments)())
    with pytest.raises(RuntimeError, match=r"torch channels_last: outputs may differ .* nothing is timed"):
        compare("test", network(), torch.randn(1, 3, 64, 64), ["torch"], runs=2)


def test_wrong_words_are_refused():
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="merged, torch, onnxruntime, openvino, got 'tensorrt'"):
        compare("test", network(), x, ["tensorrt"])
    with pytest.raises(ValueError, match="onnxruntime does not compute in bfloat16"):
        compare("test", network(), x, ["onnxruntime"], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got torch\.float16"):
        compare("test", network(), x, ["torch"], dtype=torch.float16)


def test_parts_add_up_to_the_network():
    model, x = network(), torch.randn(1, 3, 64, 64)
    found = parts(optimize(model, x), x, runs=3)
    everything = found[-1]
    assert everything.kind == "everything"
    assert sum(part.ms for part in found[:-1]) == pytest.approx(everything.ms)
    # the mean of a map counts nothing there
    assert everything.multiply_adds == cost(merge(model), 64).multiply_adds
    assert {part.kind for part in found} >= {"1x1 convolutions", "depthwise convolutions", "other convolutions"}


def test_command_prints_a_table_and_keeps_the_record(tmp_path, capsys):
    record = tmp_path / "folder" / "records.jsonl"
    words = ["bench", "model", "replknet_cifar_l", "--size", "32", "--against", "torch", "--runs", "2", "--parts"]
    assert main([*words, "--output", str(record)]) == 0
    printed = capsys.readouterr().out
    assert "1 image of 32x32, float32" in printed
    assert all(way in printed for way in (OURS, "torch channels_last", "torch contiguous", "1x1 convolutions"))
    assert main([*words, "--output", str(record), "--json"]) == 0
    lines = record.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == json.loads(capsys.readouterr().out)
    assert json.loads(lines[0])["rows"][0]["way"] == OURS


@pytest.mark.parametrize("task", matrix([("classification",), ("features",), ("segmentation",)], [("features",)]))
def test_command_takes_tasks(task, capsys):
    words = ["bench", "model", "replknet_test", "--against", "merged", "--runs", "2", "--size", "64", "96", "--json"]
    assert main([*words, "--task", task]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["shape"]) == (task, [1, 3, 64, 96])


def test_command_names_what_it_does_not_know(capsys):
    assert main(["bench", "model", "replknet_tset"]) == 2
    assert "replknet_test" in capsys.readouterr().err
    assert main(["bench", "model", "replknet_cifar_l", "--task", "features"]) == 2
    assert "--task features takes a model's name" in capsys.readouterr().err
