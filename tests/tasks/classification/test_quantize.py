"""int8 files: they classify as torch does, a delicate layer is found and stays in float32, and no bad file is left."""

import json
from collections import Counter
from dataclasses import replace

import onnx
import openvino
import pytest
import timm
import torch
from torch import nn

from matrix import matrix
from replknet.cli.main import main
from replknet.deploy.verify import AccuracyError
from replknet.models import Description, save_model
from replknet.models.replknet import CONFIGS
from replknet.nn import merge
from replknet.tasks.classification import quantize
from replknet.tasks.classification.export import card_of
from replknet.tasks.classification.int8 import _text
from replknet.tasks.classification.quantize import ENDINGS, _fewest, quantize_classifier, ranges
from replknet.tasks.files import load_network

STEPS = 40
FORM = {"kernels": (23, 9), "depths": (1, 1), "channels": (8, 16), "stem_stride": 2, "small_kernel": 3}
DESCRIPTION = Description(
    config=replace(CONFIGS["replknet_test"], **FORM),
    classes=("a", "b", "c"),
    num_classes=3,
    image_size=12,
    crop_pct=1.0,
    mean=(0.4,) * 3,
    std=(0.2,) * 3,
)
LARGE = "stages.0.blocks.0.large_kernel.lkb_reparam"
# layers: a stem of 4, 2 stages of 3 and 2, a transition of 2, the head
LAYERS = 4 + 2 * 5 + 2 + 1


@pytest.fixture(scope="module")
def images():
    """Noise on colours."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(256, 3, 12, 12, generator=generator) + 0.5 * torch.randn(256, 3, 1, 1, generator=generator)


@pytest.fixture(scope="module")
def network(images):
    """A network that was trained to tell the colours apart."""
    torch.manual_seed(0)
    model = timm.create_model("replknet_test", num_classes=3, **FORM)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(images), images.mean((2, 3)).argmax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    return model


@pytest.fixture(scope="module")
def scored(network, images):
    """The images with what the network says of them, so that every other answer is a loss."""
    with torch.no_grad():
        labels = network(images).argmax(1)
    assert labels.bincount().min() > 30
    return list(zip(images.split(64), labels.split(64), strict=True))


def delicate(network):
    """The same network but for a weight in each large kernel of the first layer that no pixel meets.

    Maps have at most ten rows here, so that the corner of 23x23 lies in the zeros around them.
    """
    other = merge(network)
    weight = other.get_submodule(LARGE).weight
    weight.data[:, 0, 0, 0] = 1000 * weight.abs().max()
    return other


def layers_in_int8(path):
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        integers = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        integers &= {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")}
        return len(integers)
    operations = openvino.Core().read_model(path).get_ops()
    return sum(
        node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8 for node in operations
    )


@pytest.mark.parametrize("to", matrix(ENDINGS, ["onnx"]))
def test_a_file_has_every_layer_in_int8_and_classifies_as_torch_does(to, network, images, scored, tmp_path):
    path = tmp_path / f"net{ENDINGS[to]}"
    card = card_of(DESCRIPTION, "mit")
    found = quantize_classifier(network, card, path, to, [images[:64]], scored, loss=20)
    assert (found.images, found.before, found.trials) == (256, 1.0, 1)
    assert found.after == found.all_int8 > 0.8
    assert found.lost == found.lost_all_int8 == pytest.approx(1 - found.after)
    assert len(found.layers) == layers_in_int8(path) == LAYERS
    assert [layer for layer in found.layers if layer.kept or layer.sensitivity is not None] == []
    assert found.bytes_after == sum(file.stat().st_size for file in tmp_path.iterdir())
    exported, card = load_network(path).model, load_network(path).description
    assert (card.classes, card.licence, card.mean) == (("a", "b", "c"), "mit", (0.4,) * 3)
    with torch.no_grad():
        got, wanted = exported(images), network(images)
    # it is not the network in float32, and not far from it
    assert 1e-4 < ((got - wanted).norm() / wanted.norm()).item() < 0.2
    assert (got.argmax(1) == wanted.argmax(1)).float().mean().item() == found.after
    assert exported(torch.randn(2, 3, 20, 15)).shape == (2, 3)


@pytest.mark.full
def test_a_delicate_layer_is_found_and_stays_in_float32(network, images, scored, tmp_path):
    path, model = tmp_path / "net.int8.onnx", delicate(network)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images), rtol=1e-3, atol=1e-3)
    found = quantize_classifier(model, card_of(DESCRIPTION), path, "onnx", [images[:64]], scored, loss=10)
    assert found.before == 1
    assert found.all_int8 < 0.9 <= found.after
    assert [layer.name for layer in found.layers if layer.kept] == [LARGE]
    assert layers_in_int8(path) == LAYERS - 1
    by_name = {layer.name: layer for layer in found.layers}
    worst = by_name.pop(LARGE)
    assert worst.sensitivity > 2 * max(layer.sensitivity for layer in by_name.values())
    assert worst.ranges.peak > 5 * by_name["stages.1.blocks.0.large_kernel.lkb_reparam"].ranges.peak
    # all but the tap that no pixel meets
    assert worst.ranges.zeros == pytest.approx(1 - 1 / 23**2)


@pytest.mark.full
def test_the_delicate_layer_is_found_for_openvino_as_well(network, images, scored, tmp_path):
    path = tmp_path / "net.int8.xml"
    found = quantize_classifier(
        delicate(network), card_of(DESCRIPTION), path, "openvino", [images[:16]], scored, loss=10
    )
    assert [layer.name for layer in found.layers if layer.kept] == [LARGE]
    assert layers_in_int8(path) == LAYERS - 1


def test_a_bound_that_no_selection_keeps_is_refused_and_leaves_what_was_there(
    network, images, scored, tmp_path, monkeypatch
):
    path = tmp_path / "net.int8.onnx"
    path.write_text("what was there before")
    # no layer may stay in float32, so that the delicate one cannot
    monkeypatch.setattr(quantize, "MOST_FLOAT", 0.0)
    with pytest.raises(AccuracyError, match=r"int8 loses [\d.]+ points .*; 10 are allowed\. No file was written"):
        quantize_classifier(delicate(network), card_of(DESCRIPTION), path, "onnx", [images[:64]], scored, loss=10)
    assert path.read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.full
def test_one_scale_a_weight_is_coarser_than_one_a_channel(network, images, scored, tmp_path):
    # one channel with a thousandth of its values before the large kernel, and a thousand times the kernel
    model = merge(network)
    before, large = model.get_submodule("stages.0.blocks.0.pw1.conv"), model.get_submodule(LARGE)
    for parameter in (before.weight, before.bias):
        parameter.data[0] *= 1e-3
    large.weight.data[0] *= 1e3
    errors = {}
    for per_channel in (True, False):
        path = tmp_path / f"{per_channel}.int8.onnx"
        quantize_classifier(model, card_of(DESCRIPTION), path, "onnx", [images[:64]], scored, 100, per_channel)
        with torch.no_grad():
            errors[per_channel] = (load_network(path).model(images) - network(images)).norm().item()
    assert errors[False] > 2 * errors[True]


def test_answers_that_are_gained_hide_none_that_are_lost(network, images, scored, tmp_path):
    # labels of which the network has half wrong, so that other answers may be right by chance
    half = [(x, torch.where(torch.arange(len(y)) % 2 == 0, y, (y + 1) % 3)) for x, y in scored]
    path = tmp_path / "net.int8.onnx"
    found = quantize_classifier(delicate(network), card_of(DESCRIPTION), path, "onnx", [images[:64]], half, loss=100)
    assert found.before == 0.5
    assert found.lost > found.before - found.after + 0.05


def test_ranges_are_what_they_say():
    weight = torch.zeros(2, 1, 5, 5)
    weight[:, :, 1:4, 1:4] = 4.0
    weight[:, :, 0] = 1.0
    weight[1] *= 1e-3
    found = ranges(weight)
    rms = ((9 * 16 + 5) / 25) ** 0.5
    assert found.peak == pytest.approx(4 / rms)
    assert found.spread == pytest.approx(4 / ((4 + 0.004) / 2))
    # five of the sixteen taps around the centre are 1
    assert found.centre == pytest.approx(4 / (5 / 16))
    assert found.outer_steps == 0
    assert found.zeros == pytest.approx(11 / 25)
    # the second channel is below half a step of the first
    assert found.zeros_per_tensor == pytest.approx((11 + 25) / 50)
    weight[weight == 0] = 0.5
    assert ranges(weight[:1]).outer_steps == pytest.approx(127 * 0.5 / 4)
    assert ranges(torch.ones(3, 4)).centre is None
    assert ranges(torch.zeros(3, 4)).peak == 0


@pytest.mark.parametrize("wanted", [1, 2, 5, 8])
def test_the_fewest_layers_are_found_by_bisection(wanted):
    asked = Counter()

    def fits(number):
        asked[number] += 1
        return number >= wanted

    assert _fewest(fits, 8) == wanted
    assert 0 not in asked
    assert max(asked.values()) == 1
    assert len(asked) <= 4
    assert _fewest(fits, wanted - 1) is None


def test_wrong_calls_say_what_was_expected(network, images, scored, tmp_path):
    card = card_of(DESCRIPTION)
    for name, to, calibration, labelled, loss, message in (
        ("net.onnx", "onnx", [images], scored, 0.5, r"a file in int8 for onnx ends in .int8.onnx, got net.onnx"),
        ("net.int8.onnx", "onnx", [images], scored, -1.0, r"must be 0 points or more, got -1.0"),
        ("net.int8.onnx", "onnx", [], scored, 0.5, r"calibration needs at least one image, got none"),
        ("net.int8.onnx", "onnx", [images], [None], 0.5, r"needs at least one image to measure accuracy, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_classifier(network, card, tmp_path / name, to, calibration, labelled, loss)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """A network with the ten classes of the stand-in for CIFAR-10."""
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    description = replace(DESCRIPTION, classes=(), num_classes=10, image_size=32)
    torch.manual_seed(0)
    save_model(description.build().eval(), path, description)
    return str(path)


def test_the_command_says_what_int8_costs(saved, cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    path = tmp_path / "net.int8.onnx"
    command = ["export", saved, "--int8", "--to", "onnx", "--data", str(cifar), "-o", str(path), "--licence", "mit"]
    # the weights of an OpenVINO file of this name
    path.with_suffix(".bin").write_text("more bytes")
    few = ["--calibration", "32", "--search", "100", "--loss", "100"]
    assert main([*command, *few, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["calibration"], told["search"]["images"]) == (60, 32, 100)
    assert (told["card"]["licence"], told["bytes_after"]) == ("mit", path.stat().st_size)
    assert len(told["search"]["layers"]) == LAYERS
    assert [times["images"] for times in told["times"]] == [1, 32]
    assert all(times[when]["p50_ms"] > 0 for times in told["times"] for when in ("before", "after"))
    assert main(["eval", saved, "--data", str(cifar), "--json"]) == 0
    assert told["top1_before"] == json.loads(capsys.readouterr().out)["top1"]
    text = _text(told)
    assert f"top-1 of 60 test images {100 * told['top1_before']:.2f} % before" in text
    assert "layers kept in float32: none" in text
    # a loss that shows on the test images alone
    monkeypatch.setattr(
        "replknet.tasks.classification.int8._quantized", lambda *args: {**told, "top1_before": 0.5, "top1_after": 0.49}
    )
    assert main([*command, "--loss", "0.5"]) == 1
    assert "the test images lose 1.00 points, more than the 0.5" in capsys.readouterr().err
    layer = told["search"]["layers"][5]
    layer |= {"kept": True, "sensitivity": 0.25}
    assert f"  {LARGE} [8, 1, 23, 23]: alone it changes the logits by 25.0 %" in _text(told)


def test_the_command_fails_in_a_line(saved, cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    path = tmp_path / "net.int8.onnx"
    command = ["export", saved, "--int8", "--to", "onnx", "--data", str(cifar), "-o", str(path)]
    assert main(command) == 2
    assert "expected more training images than the 512 for calibration, got 240" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "net.onnx"), "--calibration", "32"]) == 2
    assert "a file in int8 for onnx ends in .int8.onnx" in capsys.readouterr().err

    def refused(*args):
        raise AccuracyError("the reason")

    monkeypatch.setattr("replknet.tasks.classification.int8.quantize_classifier", refused)
    assert main([*command, "--calibration", "32"]) == 1
    assert capsys.readouterr().err == "replknet export: the reason\n"
    assert list(tmp_path.iterdir()) == []
