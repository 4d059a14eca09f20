"""Classifiers as files: every format computes what torch does at sizes that were not traced, and says what it is."""

import json
import os
from copy import deepcopy
from dataclasses import replace

import onnx
import openvino
import pytest
import timm
import torch
from torch import nn

from matrix import matrix
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.deploy import files
from replknet.deploy.files import BOUND, ENDINGS, format_of, is_exported
from replknet.deploy.programs import save_pt2
from replknet.models import Description, save_model
from replknet.models.replknet import CONFIGS
from replknet.tasks.classification.export import card_of, export_classifier
from replknet.tasks.files import load_network

DESCRIPTION = Description(
    config=CONFIGS["replknet_test"],
    classes=("a", "b", "c"),
    num_classes=3,
    image_size=64,
    mean=(0.4,) * 3,
    std=(0.2,) * 3,
)
FORMATS = matrix(["onnx", "openvino", "pt2", "aoti"], ["onnx"])


def network():
    torch.manual_seed(0)
    model = timm.create_model("replknet_test", num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_is_the_network_at_any_size_and_says_what_it_is(to, tmp_path):
    model, path = network(), tmp_path / f"net{ENDINGS[to]}"
    found = export_classifier(model, card_of(DESCRIPTION, "mit"), path, to, [torch.randn(1, 3, 64, 64)])
    assert found.relative <= BOUND
    assert found.absolute > 0, "both may not come from one computation"
    network_in_file = load_network(path, trust=True)
    exported, card = network_in_file.model, network_in_file.description
    assert (card.classes, card.num_classes, card.name, card.licence) == (("a", "b", "c"), 3, "replknet_test", "mit")
    assert (card.image_size, card.crop_pct, card.crop_mode, card.interpolation) == (64, 0.875, "center", "bicubic")
    assert (card.mean, card.std) == ((0.4,) * 3, (0.2,) * 3)
    assert card.made_by.startswith("replknet ")
    with torch.no_grad():
        for shape in ((1, 3, 33, 47), (5, 3, 200, 90)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == (
        [".bin", ".xml"] if to == "openvino" else [path.suffix]
    )


def test_onnx_has_standard_nodes_alone(tmp_path):
    export_classifier(network(), card_of(DESCRIPTION), tmp_path / "net.onnx", "onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    kinds = [node.op_type for node in graph.node]
    # a stem of 4, 5 blocks with 3 each and 5 feed-forwards with 2, 3 transitions of 2; the head is a product
    assert kinds.count("Conv") == 4 + 15 + 10 + 6
    # that of the last sum, which no convolution follows
    assert kinds.count("BatchNormalization") == 1
    batch, _, height, width = (side.dim_param for side in graph.input[0].type.tensor_type.shape.dim)
    assert all((batch, height, width))


def test_large_images_are_warped_as_the_official_evaluation_does():
    card = card_of(Description(config=CONFIGS["replknet_31b"], image_size=384))
    assert (card.crop_mode, card.crop_pct) == ("squash", 1.0)


@pytest.mark.parametrize("to", matrix(["onnx", "openvino", "pt2"], ["onnx"]))
def test_a_file_that_computes_something_else_is_not_kept(to, tmp_path, monkeypatch):
    path = tmp_path / f"net{ENDINGS[to]}"
    path.write_text("what was there before")
    right = files._program

    def wrong(merged, stride):
        other = deepcopy(merged)
        other.head.bias.data += 1e-3
        return right(other, stride)

    monkeypatch.setattr(files, "_program", wrong)
    with pytest.raises(
        RuntimeError, match=r"does not compute what torch computes, so it was not kept: the logits may differ by 1e-05"
    ):
        export_classifier(network(), card_of(DESCRIPTION), path, to)
    assert path.read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_calls_say_what_was_expected(tmp_path):
    card = card_of(DESCRIPTION)
    with pytest.raises(ValueError, match=r"a file for openvino ends in .xml, got net.onnx"):
        export_classifier(network(), card, tmp_path / "net.onnx", "openvino")
    with pytest.raises(ValueError, match=r"a file for pt2 ends in .pt2, got net.aoti.pt2"):
        export_classifier(network(), card, tmp_path / "net.aoti.pt2", "pt2")
    with pytest.raises(ValueError, match=r"sides of more than 32 pixels, got \[1, 3, 32, 64\]"):
        export_classifier(network(), card, tmp_path / "net.onnx", "onnx", [torch.zeros(1, 3, 32, 64)])
    with pytest.raises(ValueError, match=r"ends in .onnx, .xml, .pt2, .aoti.pt2, got net.tflite"):
        format_of(tmp_path / "net.tflite")
    with pytest.raises(FileNotFoundError, match=r"no exported network at nowhere\.onnx"):
        load_network("nowhere.onnx")
    assert format_of(tmp_path / "net.aoti.pt2") == "aoti"
    assert not is_exported("model.safetensors")


def test_a_name_may_be_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.d") / os.fsdecode(b"net\xfe.onnx")
    export_classifier(network(), card_of(DESCRIPTION), path, "onnx")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_network(path).description.classes == ("a", "b", "c")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(ValueError, match=r"net\.onnx is a folder: name the file to write, such as .*/net\.onnx/net"):
        export_classifier(network(), card_of(DESCRIPTION), tmp_path / "net.onnx", "onnx")


def test_a_file_of_others_has_no_card(tmp_path):
    x = torch.zeros(1, 3, 8, 8)
    program = torch.export.export(nn.Conv2d(3, 2, 3), (x,))
    save_pt2(program, tmp_path / "other.pt2")
    openvino.save_model(openvino.convert_model(program), tmp_path / "other.xml")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "other.onnx")
    for ending in ("pt2", "xml", "onnx"):
        with pytest.raises(ValueError, match=rf"other\.{ending} says nothing about its classes and images"):
            load_network(tmp_path / f"other.{ending}", trust=True)


def test_commands_export_and_predict_the_same_classes(tmp_path, capsys):
    save_model(network(), tmp_path / "net.safetensors", DESCRIPTION)
    images = [str(photo) for photo in PHOTOS]
    assert main(["predict", str(tmp_path / "net.safetensors"), *images, "--json"]) == 0
    wanted = [json.loads(line)["top"] for line in capsys.readouterr().out.splitlines()]
    for to in ("onnx", "openvino"):
        path = str(tmp_path / f"net{ENDINGS[to]}")
        command = ["export", str(tmp_path / "net.safetensors"), "--to", to, "-o", path, "--licence", "mit", "--json"]
        assert main(command) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["difference"]["relative"] <= told["bound"]
        assert (told["images"], told["card"]["licence"], told["card"]["classes"]) == (2, "mit", ["a", "b", "c"])
        assert main(["predict", path, *images, "--json"]) == 0
        found = [json.loads(line)["top"] for line in capsys.readouterr().out.splitlines()]
        for one, other in zip(found, wanted, strict=True):
            assert [guess["name"] for guess in one] == [guess["name"] for guess in other]
            assert one[0]["probability"] == pytest.approx(other[0]["probability"], abs=1e-4)
    assert main(["export", "replknet_cifar_l", "--to", "onnx", "-o", str(tmp_path / "net.xml")]) == 2
    assert "a file for onnx ends in .onnx, got net.xml" in capsys.readouterr().err


def test_an_exported_file_is_scored_like_its_checkpoint(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    torch.manual_seed(0)
    description = replace(DESCRIPTION, classes=(), num_classes=10, image_size=64)
    model = description.build().eval()
    save_model(model, tmp_path / "net.safetensors", description)
    export_classifier(model, card_of(description), tmp_path / "net.onnx", "onnx")
    scores = []
    for name in ("net.safetensors", "net.onnx"):
        assert main(["eval", str(tmp_path / name), "--data", str(cifar), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[1]["top1"] == scores[0]["top1"]
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-4)
