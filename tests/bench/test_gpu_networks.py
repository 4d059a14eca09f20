"""Networks and tiles on a GPU, where there is none."""

from contextlib import nullcontext

import torch

from replknet.bench import gpu_layers, gpu_networks, gpu_tiles
from replknet.bench.cases import Case
from replknet.bench.records import Record
from replknet.kernels import reference
from replknet.timing import quantiles_of


def timer(call):
    call()
    return quantiles_of([1.0, 2.0, 3.0])


def networks(model="replknet_nano", ways=("default", "native", "aten"), timer=timer):
    return list(gpu_networks.measure(model, ways, (2, 3), "cpu", timer, 32))


def test_networks_are_compared_before_they_are_timed():
    found = networks()
    assert [(one.what, one.way, one.shape[0]) for one in found] == [
        (what, f"{way} nhwc", n)
        for n in (2, 3)
        for way in ("default", "native", "aten")
        for what in ("inference", "training step")
    ]
    lines = gpu_networks.rows(found)
    assert all("1.00 x torch's convolution" in line for line in lines)
    assert "N=2 " in lines[0]
    assert "1000.0 images/s" in lines[0]


def test_a_network_that_differs_gets_no_time(monkeypatch):
    real = gpu_networks._logits
    monkeypatch.setattr(gpu_networks, "_logits", lambda way, *rest: real(way, *rest) * (1.1 if way == "native" else 1))
    found = networks()
    assert [one.way for one in found if isinstance(one, gpu_layers.Wrong)] == ["replknet_nano native nhwc"] * 2
    assert {one.backend for one in found if isinstance(one, Record)} == {"default", "aten"}


def test_the_default_way_forces_no_backend(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_networks, "use_backend", lambda name: asked.append(name) or nullcontext())
    networks("replknet_test", ("default",))
    # for each batch the truth, the comparison, inference and training
    assert asked == ["aten", None, None, None] * 2


def test_networks_of_timm_are_timed_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen = set()
    found = networks("convnext_atto", ("torch",), lambda call: seen.add(torch.backends.cudnn.benchmark) or timer(call))
    assert [(one.what, one.way) for one in found] == [("inference", "torch nhwc"), ("training step", "torch nhwc")] * 2
    # its kernels are small, those of RepLKNet are not
    assert seen == {True}
    networks(timer=lambda call: seen.add(torch.backends.cudnn.benchmark) or timer(call))
    assert seen == {True, False}


def test_images_are_channels_last_in_inference_and_training(monkeypatch):
    seen = []
    for name in ("_logits", "_step"):
        real = getattr(gpu_networks, name)

        def run(way, model, x, *rest, real=real):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return real(way, model, x, *rest)

        monkeypatch.setattr(gpu_networks, name, run)
    networks("replknet_test", ("aten",))
    assert seen == [True] * 8


def test_a_network_is_compiled_in_a_copy_with_few_blocks(monkeypatch):
    built = []
    real = gpu_networks.timm.create_model
    monkeypatch.setattr(gpu_networks.timm, "create_model", lambda *a, **k: built.append(real(*a, **k)) or built[-1])
    gpu_networks.compile_network("replknet_nano", 2, "native", "cpu", 32)
    assert [len(stage.blocks) for stage in built[0].stages] == [2, 2, 2, 2]
    assert built[0].training


def test_every_tile_is_timed_and_compiled_before(monkeypatch):
    tiles = []

    def run(tile, x, weight, bias, relu):
        tiles.append(tile)
        return reference.forward(x, weight, bias, relu)

    def run_gradient(tile, dy, x, kh, kw):
        tiles.append(tile)
        return reference.backward(dy, x, torch.empty(x.shape[1], 1, kh, kw), [False, True, False])[1]

    monkeypatch.setattr(gpu_tiles.triton_run, "run", run)
    monkeypatch.setattr(gpu_tiles.triton_run, "run_gradient", run_gradient)
    case = Case("small", (2, 5, 9, 9), 7)
    found = list(gpu_tiles.measure(case, "cpu", timer))
    timed = dict.fromkeys(tiles)
    tiles.clear()
    gpu_tiles.compile_case(case, "cpu")
    assert dict.fromkeys(tiles) == timed
    assert {one.what for one in found} == {"forward", "weight gradient"}
    assert all(isinstance(one, Record) for one in found)
    assert len(gpu_tiles.rows(case, found)) == 1 + len(found)


def test_a_tile_with_a_wrong_result_gets_no_time(monkeypatch):
    def run(tile, x, weight, bias, relu):
        y = reference.forward(x, weight, bias, relu)
        y[:, -1] += 0.1
        return y

    monkeypatch.setattr(gpu_tiles.triton_run, "run", run)
    monkeypatch.setattr(gpu_tiles.triton_run, "run_gradient", lambda *args: torch.full((5, 1, 7, 7), torch.nan))
    case = Case("small", (2, 5, 9, 9), 7)
    found = list(gpu_tiles.measure(case, "cpu", timer))
    assert found
    assert all(isinstance(one, gpu_layers.Wrong) for one in found)
    assert all("WRONG" in line for line in gpu_tiles.rows(case, found)[1:])
