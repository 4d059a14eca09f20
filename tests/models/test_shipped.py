"""The weights that come with the package, as a real network: no connection, exact merging, and the score they claim."""

import json
import re
import socket
from pathlib import Path

import pytest
import timm
import torch

import replknet
from replknet.cli.main import main
from replknet.data import cifar10, images, transforms
from replknet.data.download import cache_dir
from replknet.difference import largest_difference
from replknet.models import load_model, model_files, shipped
from replknet.tasks.classification.infer import evaluate, predict

NAME = "replknet_cifar_l"
CARD = Path(model_files.__file__).parent / "weights" / "README.md"


@pytest.fixture(autouse=True)
def _no_connection(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def photo():
    transform = transforms.small_image_transform(32, cifar10.MEAN, cifar10.STD)
    cat = next(file for file in images.PHOTOS if file.name == "chelsea.jpg")
    return images.batch([cat], transform)


def test_they_are_found_by_timm_and_by_name():
    assert shipped() == [f"{NAME}.cifar10"]
    assert f"{NAME}.cifar10" in timm.list_models(f"{NAME}*", pretrained=True)
    model = timm.create_model(NAME, pretrained=True).eval()
    facts = model.pretrained_cfg
    assert (facts["mean"], facts["std"], facts["num_classes"]) == (cifar10.MEAN, cifar10.STD, 10)
    named, description = load_model(NAME, torch.float32)
    assert (description.name, description.classes, description.image_size) == (NAME, cifar10.CLASSES, 32)
    with torch.inference_mode():
        assert torch.equal(model(photo()), named(photo()))
    file = model_files.weights_file(f"{NAME}.cifar10")
    assert file.stat().st_size < 8e6
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at {NAME}x; weights that come with replknet: {NAME}"):
        load_model(f"{NAME}x")


def test_they_see_a_cat(capsys):
    model, description = load_model(NAME, torch.float32)
    assert predict(model, photo(), description.classes)[0][0].name == "cat"
    assert main(["predict", NAME, str(images.PHOTOS[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top"][0]["name"] == "cat"


def test_trained_weights_merge_exactly():
    model, _ = load_model(NAME, torch.float32)
    x = torch.cat([photo(), torch.randn(8, 3, 32, 32)])
    with torch.inference_mode():
        _, relative = largest_difference(model(x), replknet.merge(model)(x))
    assert relative < 2e-5


def test_they_adapt_as_timms_weights_do():
    assert timm.create_model(NAME, pretrained=True, num_classes=3)(photo().expand(2, 3, 32, 32)).shape == (2, 3)
    assert timm.create_model(NAME, pretrained=True, in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    features = timm.create_model(NAME, pretrained=True, features_only=True)(photo().expand(2, 3, 32, 32))
    assert [tuple(f.shape) for f in features] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]


def test_their_score_is_what_the_card_says():
    decoded = cache_dir() / "cifar10" / "cifar10.safetensors"
    if not decoded.exists():
        pytest.skip("CIFAR-10 is not in the cache; `make demo` fetches it")
    claimed = float(re.search(r"top-1 (\d\d\.\d\d) %", CARD.read_text())[1])
    test = cifar10.CIFAR10(cifar10.load(), False, transforms.small_image_transform(32, cifar10.MEAN, cifar10.STD))
    model, _ = load_model(NAME, torch.float32)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(test, range(2000)), 250)
    # of 2000 images; the standard deviation is 0.6 %
    assert abs(100 * evaluate(model, loader).top1 - claimed) < 2.5
