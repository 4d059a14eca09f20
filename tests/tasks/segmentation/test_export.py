"""Segmentation networks as files: every format gives the checkpoint's classes, whole and by windows, and says how."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache

import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from matrix import matrix
from replknet.cli.main import main
from replknet.data import images
from replknet.deploy import files
from replknet.deploy.files import BOUND, ENDINGS, card_in
from replknet.tasks.files import load_network
from replknet.tasks.segmentation.export import example_of, export_segmenter, segmentation_card
from replknet.tasks.segmentation.files import SegmentationDescription, load_segmentation, save_segmentation
from replknet.tasks.segmentation.infer import inference_of, predict

DESCRIPTION = SegmentationDescription(
    backbone="replknet_test",
    network={"kernels": [7, 5, 5, 5], "small_kernel": 3},
    classes=("sky", "road", "car"),
    palette=((0, 0, 255), (90, 90, 90), (255, 0, 0)),
    channels=16,
    auxiliary_channels=8,
    align_corners=True,
    scale=(200, 120),
    window=96,
    stride=64,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
FORMATS = matrix(["onnx", "openvino", "pt2", "aoti"], ["onnx"])
PHOTOS = [str(photo) for photo in images.PHOTOS]


def network():
    torch.manual_seed(0)
    model = DESCRIPTION.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenters") / "net.safetensors"
    save_segmentation(network(), path, DESCRIPTION)
    return path


@pytest.fixture(scope="module")
def file(checkpoint):
    """The file of a format, written once by the command."""

    @cache
    def file(to):
        path = checkpoint.parent / to / f"net{ENDINGS[to]}"
        command = ["export", str(checkpoint), "--task", "segmentation", "--to", to, "-o", str(path)]
        assert main([*command, "--licence", "mit"]) == 0
        return path

    return file


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_is_the_network_at_any_size(to, checkpoint, file):
    model, exported = load_segmentation(checkpoint)[0], load_network(file(to), trust=True).model
    with torch.no_grad():
        large = torch.randn(2, 3, 130, 96)
        # a window is a part of an image, and predict gives channels last
        others = (large[:, :, 20:116], large.contiguous(memory_format=torch.channels_last))
        for x in (torch.randn(1, 3, 33, 47), large, *others):
            wanted, got = model(x), exported(x)
            # the checkpoint is not merged
            assert (got - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_says_how_it_is_used(to, file):
    assert load_network(file(to), trust=True).description == DESCRIPTION
    card, _ = card_in(file(to), trust=True)
    assert (card["task"], card["sides"], card["licence"]) == ("segmentation", (33, 8192), "mit")
    assert card["made_by"].startswith("replknet ")
    beside = sorted(path.suffix for path in file(to).parent.iterdir())
    assert beside == ([".bin", ".xml"] if to == "openvino" else [file(to).suffix])


def test_other_programs_find_everything_in_one_object(file):
    (entry,) = [e for e in onnx.load(file("onnx")).metadata_props if e.key == "replknet"]
    found = json.loads(entry.value)
    assert found["classes"] == ["sky", "road", "car"]
    assert found["palette"] == [[0, 0, 255], [90, 90, 90], [255, 0, 0]]
    assert (found["mean"], found["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    assert (found["scale"], found["window"], found["stride"], found["align_corners"]) == ([200, 120], 96, 64, True)
    assert found["licence"] == "mit"


def test_onnx_has_standard_nodes_alone(file):
    graph = onnx.load(file("onnx")).graph
    assert {node.domain for node in graph.node} == {""}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    kernels = [weights[node.input[1]][1:] for node in graph.node if node.op_type == "Conv"]
    # one a block: its small branch is merged into it
    assert [kernel for kernel in kernels if kernel[0] == 1 and kernel[1] > 3] == [[1, 7, 7], *[[1, 5, 5]] * 4]
    (image,), (logits,) = graph.input, graph.output
    assert (image.name, logits.name) == ("image", "logits")
    batch, channels, height, width = image.type.tensor_type.shape.dim
    assert channels.dim_value == 3
    assert all(side.dim_param for side in (batch, height, width))


@pytest.mark.parametrize("to", FORMATS)
def test_classes_are_those_of_the_checkpoint(to, checkpoint, file):
    model, description = load_segmentation(checkpoint)
    network_in_file = load_network(file(to), trust=True)
    exported, described = network_in_file.model, network_in_file.description
    for inference in (inference_of(description), replace(inference_of(description), window=None, stride=None)):
        for photo in images.PHOTOS:
            image = images.read(photo)
            wanted = predict(model, image, description, inference)
            got = predict(exported, image, described, inference)
            assert len(wanted.unique()) > 1, "one class alone tells nothing"
            # where two logits are equal but for rounding either may win
            assert (got != wanted).float().mean() < 1e-4


@pytest.mark.parametrize("to", FORMATS)
def test_commands_predict_the_same_classes(to, checkpoint, file, tmp_path, capsys):
    options = ["--task", "segmentation", "--json", "-o", str(tmp_path)]
    assert main(["predict", str(checkpoint), *PHOTOS, *options]) == 0
    wanted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    path = str(file(to))
    capsys.readouterr()
    assert main(["predict", path, "--trust", *PHOTOS, *options]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for one, other in zip(found, wanted, strict=True):
        assert one["image"] == other["image"]
        assert one["shares"] == pytest.approx(other["shares"], abs=1e-4)
    assert main(["predict", path, PHOTOS[0], "--task", "segmentation", "--window", "20", "--trust"]) == 2
    assert f"net{ENDINGS[to]} takes images with sides from 33 to 8192 pixels, got 20x20" in capsys.readouterr().err


@pytest.mark.parametrize("to", FORMATS)
def test_a_size_that_a_file_does_not_take_is_an_error(to, file):
    exported = load_network(file(to), trust=True).model
    with pytest.raises(ValueError, match=r"takes images with sides from 33 to 8192 pixels, got 32x64"):
        exported(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match=r"from 33 to 8192 pixels, got 40x8193"):
        exported(torch.zeros(1, 3, 40, 8193))


@pytest.mark.full
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path, model = tmp_path / "net.pt2", network()
    before = deepcopy(model.state_dict())
    path.write_text("what was there before")
    right = files._program

    def wrong(merged, stride):
        # what only training has is not written
        assert merged.auxiliary_head is None
        other = deepcopy(merged)
        other.decode_head.classifier.bias.data += 1e-3
        return right(other, stride)

    monkeypatch.setattr(files, "_program", wrong)
    with pytest.raises(RuntimeError, match=r"so it was not kept: the logits may differ by 1e-05 of the norm, got"):
        export_segmenter(model, segmentation_card(DESCRIPTION), path, "pt2")
    assert path.read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1
    # and the network stays as it was
    assert model.auxiliary_head is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.full
def test_it_is_checked_on_what_the_network_is_given(checkpoint, tmp_path, capsys, monkeypatch):
    given = []
    compared = files.compared

    def noted(name, wanted, got, bound):
        given.append(tuple(wanted.shape))
        return compared(name, wanted, got, bound)

    monkeypatch.setattr(files, "compared", noted)
    path = tmp_path / "net.pt2"
    command = ["export", str(checkpoint), "--task", "segmentation", "--to", "pt2", "-o", str(path)]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # windows of two photos, and noise
    assert given == [(1, 3, 96, 96), (1, 3, 96, 96), (1, 3, 64, 64), (3, 3, 160, 127)]
    assert 0 < told["difference"]["relative"] <= told["bound"] == BOUND
    assert (told["images"], told["card"]["window"], told["card"]["sides"]) == (2, 96, [33, 8192])
    assert told["card"]["licence"] == "unknown"


def test_an_example_is_fitted_and_cut_as_the_network_has_it():
    image = Image.new("RGB", (300, 150), (102, 0, 255))
    assert example_of(image, replace(DESCRIPTION, window=None, scale=None)).shape == (1, 3, 150, 300)
    assert example_of(image, replace(DESCRIPTION, window=None)).shape == (1, 3, 100, 200)
    x = example_of(image, replace(DESCRIPTION, window=120))
    assert x.shape == (1, 3, 100, 120)
    assert x[0, :, 5, 5].tolist() == pytest.approx([0, -2, 4 / 3], abs=1e-6)


def test_wrong_calls_say_what_was_expected(checkpoint, file, tmp_path, capsys):
    card = segmentation_card(replace(DESCRIPTION, classes=("sky",), palette=((0, 0, 255),)))
    with pytest.raises(ValueError, match=r"name each of the network's 3 classes, got 1"):
        export_segmenter(network(), card, tmp_path / "net.onnx", "onnx")
    examples = [torch.zeros(1, 3, 32, 64)]
    with pytest.raises(ValueError, match=r"sides of more than 32 pixels, got \[1, 3, 32, 64\]"):
        export_segmenter(network(), segmentation_card(DESCRIPTION), tmp_path / "net.onnx", "onnx", examples)
    path = str(file("onnx"))
    capsys.readouterr()
    assert main(["predict", path, PHOTOS[0], "--task", "detection"]) == 2
    assert "holds a segmentation network, not a detector: leave out --task detection" in (capsys.readouterr().err)
    assert main(["predict", path, PHOTOS[0], "--top", "2"]) == 2
    assert "is a segmentation network: leave out --top" in capsys.readouterr().err
    assert main(["export", str(checkpoint), "--task", "segmentation", "--to", "onnx", "-o", "net.xml"]) == 2
    assert "a file for onnx ends in .onnx, got net.xml" in capsys.readouterr().err
    assert main(["export", "replknet_cifar_l", "--task", "segmentation", "--to", "onnx"]) == 2
    assert "holds a classifier, not a segmentation network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
