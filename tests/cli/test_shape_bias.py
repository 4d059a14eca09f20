"""The command as a person types it: on a folder of cue-conflict images, and on our own of a stand-in for CIFAR-10."""

import json

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from replknet.cli.main import main
from replknet.data import cifar10
from replknet.models import NETWORKS, Description, save_model


@pytest.fixture(autouse=True)
def _ci(monkeypatch):
    monkeypatch.setenv("CI", "true")


@pytest.fixture
def stimuli(tmp_path):
    """Five images in the layout of the published ones, one of them without a conflict."""
    names = ("cat/cat1-elephant2", "cat/cat2-cat1", "dog/dog1-cat1", "oven/oven3-knife1", "truck/truck10-bird4")
    for i, name in enumerate(names):
        file = tmp_path / "stimuli" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (50 * i, 100, 30)).save(file)
    return tmp_path / "stimuli"


def saved(path, **fields):
    description = Description(config=NETWORKS["replknet_test"], image_size=64, **fields)
    save_model(description.build(), path, description)
    return str(path)


def test_a_folder_is_scored_for_several_networks(stimuli, tmp_path, capsys):
    ours = saved(tmp_path / "ours.safetensors", classes=tuple(ImageNetInfo().label_names()))
    picture = tmp_path / "bias.png"
    command = ["analyze", "shape-bias", ours, "test_vit", "--untrained", "--images", str(stimuli), "-o", str(picture)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measure"] == "cue conflict by the rule of Geirhos et al. 2019 (16 categories of ImageNet)"
    assert list(found["networks"]) == [ours, "test_vit"]
    for network in found["networks"].values():
        assert (network["images"], network["no_conflict"]) == (4, 1)
        counts = network["per_category"]
        assert len(counts) == 16
        assert {name: sum(c[k] for k in ("shape", "texture", "other")) for name, c in counts.items()}["oven"] == 1
        assert network["shape_share"] == sum(c["shape"] for c in counts.values()) / 4
    assert Image.open(picture).format == "PNG"
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "4 images with a conflict; 1 without one were left out" in text
    assert "bicycle" in text
    assert str(picture) in text


def test_our_own_conflicts_are_said_to_be_ours(cifar, tmp_path, capsys):
    network = saved(tmp_path / "c.safetensors", classes=cifar10.CLASSES, num_classes=10)
    command = [
        "analyze",
        "shape-bias",
        network,
        "--cifar10",
        "--data",
        str(cifar),
        "--each",
        "1",
        "-o",
        str(tmp_path / "c.png"),
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measure"].startswith("replknet's own texture-shape conflict of CIFAR-10 test images (not the stimuli")
    (scores,) = found["networks"].values()
    assert (scores["images"], scores["no_conflict"]) == (90, 0)
    assert list(scores["per_category"]) == list(cifar10.CLASSES)
    assert 0 <= scores["shape_alone"] <= 1
    assert 0 <= scores["texture_alone"] <= 1
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "not the stimuli of Geirhos et al." in text
    assert "right on texture alone" in text


def test_a_network_without_weights_is_not_measured_unless_asked_for(stimuli, capsys, monkeypatch):
    def unreachable(model_name, pretrained):
        assert pretrained
        raise OSError("the address cannot be reached")

    monkeypatch.setattr(timm, "create_model", unreachable)
    assert main(["analyze", "shape-bias", "resnet18", "--images", str(stimuli)]) == 2
    error = capsys.readouterr().err
    assert "timm cannot build resnet18 with its trained weights: the address cannot be reached" in error
    assert "--untrained takes it as it is initialised" in error


def test_weights_that_were_never_released_are_told(stimuli, capsys):
    assert main(["analyze", "shape-bias", "replknet_b_k3", "--images", str(stimuli)]) == 2
    assert "no weights were released for replknet_b_k3" in capsys.readouterr().err
    assert main(["analyze", "shape-bias", "resnet18.nonsense", "--images", str(stimuli)]) == 2
    assert "did you mean resnet18." in capsys.readouterr().err


def test_networks_with_other_classes_are_refused(stimuli, tmp_path, capsys, cifar):
    images, ours = ["--images", str(stimuli)], ["--cifar10", "--data", str(cifar)]
    swapped = tuple(reversed(ImageNetInfo().label_names()))
    for network, options, message in (
        ("replknet_cifar_l", images, "has 10 outputs; images in a folder need a network with the 1000 classes"),
        ("vit_base_patch16_224.augreg_in21k", images, "has 21843 outputs"),
        (
            saved(tmp_path / "a.safetensors", classes=swapped),
            images,
            "expected n01440764, n01443537, ..., got n15075141",
        ),
        (saved(tmp_path / "b.safetensors"), ours, "expected airplane, automobile, ..., got 1000 without names"),
        ("nowhere.pth", images, "nowhere.pth is no checkpoint file"),
        ("nowhere.pth", images, "and no model of timm's"),
        ("resnet18", ours, "no checkpoint at resnet18"),
    ):
        assert main(["analyze", "shape-bias", network, *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_one_kind_of_images_is_named(stimuli, capsys):
    for options in ([], ["--cifar10", "--images", str(stimuli)]):
        assert main(["analyze", "shape-bias", "replknet_cifar_l", *options]) == 2
        assert "with --images DIR, or take our own with --cifar10" in capsys.readouterr().err


def test_an_untrained_network_decides_for_few(stimuli, capsys, tmp_path):
    torch.manual_seed(0)
    network = saved(tmp_path / "n.safetensors")
    assert main(["analyze", "shape-bias", network, "--images", str(stimuli), "-o", str(tmp_path / "n.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    # where no image was taken for either cue there is a dash
    assert sum(line.split()[-1] == "-" for line in lines[-17:-1]) >= 12
