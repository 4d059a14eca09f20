"""`replknet export` of a detector, and `replknet predict` of the file: the same objects, whatever the image's size."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from replknet.cli.main import main
from replknet.deploy.files import card_in
from replknet.tasks.detection.files import DetectionDescription, load_detection, save_detection
from replknet.tasks.detection.infer import predict
from replknet.tasks.files import load_network

DESCRIPTION = DetectionDescription(
    detector="fcos",
    backbone="replknet_test",
    network={},
    classes=("round", "square", "long"),
    channels=16,
    scale=(96, 64),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A detector that finds objects in noise and none in a plain image, and images of several sizes."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = DESCRIPTION.build()
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif path.endswith("bbox_head.conv_cls"):
            nn.init.normal_(module.weight, std=0.5)
            module.bias.data[:] = -6.0
        elif path.endswith("bbox_head.conv_reg"):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.constant_(module.bias, 3.0)
    save_detection(model, folder / "net.safetensors", DESCRIPTION)
    generator = np.random.default_rng(0)
    for name, size in {"same": (64, 96), "large": (200, 290), "small": (30, 50), "tall": (96, 64)}.items():
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def file(folder):
    path = folder / "net.onnx"
    command = ["export", str(folder / "net.safetensors"), "--to", "onnx", "-o", str(path), "--licence", "mit"]
    assert main([*command, "--images", str(folder / "same.png")]) == 0
    return path


def test_the_card_says_what_the_file_takes(file):
    card, _ = card_in(file)
    assert (card["task"], card["size"], card["licence"]) == ("detection", (64, 96), "mit")
    assert load_network(file).description == DESCRIPTION


@pytest.mark.parametrize("name", ["same", "large", "small"])
def test_the_file_finds_what_the_checkpoint_finds(name, folder, file):
    model, _ = load_detection(folder / "net.safetensors")
    image = Image.open(folder / f"{name}.png").convert("RGB")
    wanted = predict(model, image, DESCRIPTION)
    got = predict(load_network(file).model, image, DESCRIPTION)
    assert len(wanted["boxes"]) > 0
    # an image of the file's own form, in another size, is fitted into it exactly but for a pixel of rounding
    exact = name == "same"
    torch.testing.assert_close(got["scores"][:1], wanted["scores"][:1], rtol=0, atol=1e-4 if exact else 0.2)
    if exact:
        assert len(got["boxes"]) == len(wanted["boxes"])
        torch.testing.assert_close(got["boxes"], wanted["boxes"], rtol=0, atol=1e-2)
        assert got["labels"].tolist() == wanted["labels"].tolist()


def test_objects_lie_inside_an_image_of_another_form(folder, file):
    image = Image.open(folder / "tall.png").convert("RGB")
    found = predict(load_network(file).model, image, DESCRIPTION)
    limits = torch.tensor([64.0, 96.0, 64.0, 96.0])
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= limits).all()


def test_the_command_predicts_from_the_file(folder, file, capsys):
    assert main(["predict", str(file), str(folder / "same.png"), "--min-score", "0", "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)["objects"]
    assert objects
    assert {one["class"] for one in objects} <= set(DESCRIPTION.classes)


def test_other_formats_and_empty_images_are_refused(folder, tmp_path, capsys):
    Image.new("RGB", (96, 64)).save(tmp_path / "plain.png")
    command = ["export", str(folder / "net.safetensors"), "--to"]
    assert main([*command, "pt2", "-o", str(tmp_path / "n.pt2"), "--images", str(folder / "same.png")]) == 2
    assert "torch.export refuses sizes that depend on the image" in capsys.readouterr().err
    assert main([*command, "onnx", "--int8", "-o", str(tmp_path / "n.onnx")]) == 2
    assert "int8 is for classification, and" in capsys.readouterr().err
