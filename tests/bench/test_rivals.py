"""The comparison of networks on tiny ones: what is counted, timed, refused and drawn."""

import json
import platform
import subprocess
from dataclasses import asdict, replace

import pytest
import timm
import torch
from matplotlib import pyplot as plt

from replknet.analysis import cost, plots
from replknet.bench import rivals
from replknet.bench.rivals import MODES, PUBLISHED, RIVALS, Memory, Mode, Rival

TINY = Mode("tiny", 64)
DENSE = Mode("tiny dense", 64, dense=True)
NETWORKS = (
    Rival(name="ours", model="replknet_test", convolution="operator"),
    Rival(name="ours on torch", model="replknet_test", convolution="aten"),
    Rival(name="theirs", model="test_resnet"),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for rival in NETWORKS:
        monkeypatch.setitem(RIVALS, rival.name, rival)


@pytest.fixture
def no_process(monkeypatch):
    """Without the processes that measure memory, which import everything anew."""
    calls = []
    memory = Memory(10**6, 3 * 10**6, 3 * 10**6, 5 * 10**6)
    monkeypatch.setattr(rivals, "peak", lambda model, *facts: calls.append(facts) or memory)
    return calls


@pytest.mark.parametrize("mode", [TINY, DENSE], ids=lambda mode: mode.name)
def test_networks_are_counted_and_timed_in_both_layouts(no_process, mode):
    records = rivals.measure(mode, ["ours", "ours on torch", "theirs"], runs=2, limit_s=1.0)
    assert [record.name for record in records] == ["ours", "ours on torch", "theirs"]
    for record, backend in zip(records, (None, "aten", None), strict=True):
        assert record.timings.keys() == {"nhwc", "nchw"}
        assert record.timing == min(record.timings.values(), key=lambda timing: timing.p50_ms)
        assert (record.mode, record.size, record.threads) == (mode.name, 64, torch.get_num_threads())
        assert no_process.pop(0) == (64, record.layout, backend, "cpu")
    ours, on_torch, theirs = records
    assert (ours.parameters, ours.multiply_adds) == (on_torch.parameters, on_torch.multiply_adds)
    if not mode.dense:
        expected = cost(timm.create_model("test_resnet", num_classes=1000), 64)
        assert (theirs.parameters, theirs.multiply_adds) == (expected.parameters, expected.multiply_adds)
    again = json.loads(json.dumps([asdict(record) for record in records]))
    assert again[0]["timings"][ours.layout]["p50_ms"] == ours.timing.p50_ms
    assert again[0]["memory"]["peak_bytes"] == 5 * 10**6


def test_a_network_is_merged_for_the_operator_alone():
    ours, _, theirs = NETWORKS
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in rivals.network(ours, DENSE).modules())
    unmerged = rivals.network(replace(ours, convolution="torch"), TINY)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in unmerged.modules())
    levels = rivals.network(theirs, DENSE)(torch.randn(1, 3, 64, 64))
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2]


@pytest.mark.full
def test_the_peak_of_memory_is_of_a_process_of_its_own():
    found = rivals.peak(rivals.network(NETWORKS[0], TINY), 512, "nhwc", None)
    assert 0 < found.program_bytes <= found.loaded_bytes <= found.loaded_peak_bytes <= found.peak_bytes
    # the map after the stem's first convolution alone, 8 channels at half the size
    assert found.peak_bytes - found.loaded_bytes > 4 * 8 * 256**2


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux tells the peak of memory")
def test_memory_is_read_before_and_after_one_run(tmp_path):
    torch.save(rivals.network(NETWORKS[0], TINY), tmp_path / "network.pt")
    threads = str(torch.get_num_threads())
    # an earlier test may have left this process a higher peak, and free memory
    found = Memory(**rivals._run_once(str(tmp_path / "network.pt"), "64", "nhwc", "aten", "cpu", threads))
    assert 0 < found.program_bytes <= found.peak_bytes
    assert found.loaded_bytes <= found.loaded_peak_bytes <= found.peak_bytes


def test_a_process_that_fails_is_an_error_with_its_last_words(monkeypatch):
    def run(command, **options):
        assert command[1:3] == ["-m", "replknet.bench.rivals"]
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="Traceback\nValueError: no such thing\n")

    monkeypatch.setattr(rivals.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="memory ended with 1, not 0: ValueError: no such thing"):
        rivals.peak(torch.nn.Identity(), 64, "nhwc", None, device="cuda")


def test_a_machine_that_does_not_tell_has_no_peak(monkeypatch):
    monkeypatch.setattr(rivals.platform, "system", lambda: "Darwin")
    assert rivals.peak(torch.nn.Identity(), 64, "nhwc", None) is None


def test_outputs_that_differ_or_are_not_finite_are_not_timed(monkeypatch, no_process):
    def broken(model):
        torch.nn.init.normal_(next(model.parameters()))

    monkeypatch.setattr(rivals, "accelerate", broken)
    monkeypatch.setitem(RIVALS, "theirs on ours", Rival(name="theirs on ours", model="test_resnet", convolution="aten"))
    with pytest.raises(RuntimeError, match="theirs on ours in nhwc must give the outputs of test_resnet's first way"):
        rivals.measure(TINY, ["theirs", "theirs on ours"], runs=2)

    def spoiled(model):
        torch.nn.init.constant_(next(model.parameters()), torch.nan)

    monkeypatch.setattr(rivals, "accelerate", spoiled)
    with pytest.raises(RuntimeError, match="difference of nan"):
        rivals.measure(TINY, ["theirs on ours"], runs=2)


def test_an_unknown_network_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"no network is called 'DeiT'; there are RepLKNet-31B, "):
        rivals.measure(TINY, ["DeiT"])


def test_the_comparison_is_the_papers():
    assert {name: (mode.size, mode.dense) for name, mode in MODES.items()} == {
        "classifier 224": (224, False),
        "classifier 384": (384, False),
        "backbone 512": (512, True),
    }
    assert all(timm.is_model(rival.model) for rival in RIVALS.values())
    assert timm.is_model(RIVALS["Swin-B"].at_384)
    assert PUBLISHED.keys() <= RIVALS.keys()
    ours, swin = PUBLISHED["RepLKNet-31B"], PUBLISHED["Swin-B"]
    assert (ours.top1_224, ours.top1_384, swin.top1_224, swin.top1_384) == (83.5, 84.8, 83.5, 84.5)
    # not known from a source
    assert PUBLISHED["ConvNeXt-B"].top1_224 is None


def test_the_count_of_swin_has_the_products_of_its_attention():
    swin = rivals.network(RIVALS["Swin-B"], MODES["classifier 224"])
    expected = 56**2 * 48 * 128 + 1024 * 1000  # patches of 4x4x3, classifier
    tokens, channels = 56**2, 128
    for depth in (2, 2, 18, 2):
        # q, k, v, projection and MLP, then q times k and attention times v in windows of 7x7
        expected += depth * (12 * tokens * channels**2 + 2 * 7**2 * tokens * channels)
        if channels < 1024:
            expected += tokens // 4 * 4 * channels * 2 * channels  # four tokens become one of twice the channels
        tokens, channels = tokens // 4, 2 * channels
    found = cost(swin, 224).multiply_adds
    assert found == expected
    assert found / 1e9 == pytest.approx(PUBLISHED["Swin-B"].gmacs_224, rel=0.01)


def test_times_and_memory_are_drawn():
    panels = {
        "a": dict.fromkeys(("ours", "theirs"), (1.0, 2.0, 4.0, 2.0, 4.0)),
        "b": {"ours": (1.0, 2.0, 4.0, None, None)},
    }
    figure = plots.rivals(panels)
    left, right, _, none = figure.axes
    assert [text.get_text() for text in left.texts] == ["2", "2"]
    assert [text.get_text() for text in right.texts] == ["2 + 2", "2 + 2"]
    assert not none.patches
    plt.close(figure)
