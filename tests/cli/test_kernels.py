"""`replknet kernels` as a person types it."""

import json

import pytest
import timm
import torch
from PIL import Image

from replknet.cli.main import main
from replknet.models import Description, load_model, save_model
from replknet.models.replknet import CONFIGS
from replknet.nn import merge


def test_shipped_weights_show_both_branches(tmp_path, capsys):
    picture = tmp_path / "kernels.png"
    assert main(["analyze", "kernels", "replknet_cifar_l", "-o", str(picture), "--json"]) == 0
    assert Image.open(picture).format == "PNG"
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["untrained"]) == (str(picture), False)
    assert [layer["sides"][0] for layer in result["layers"]] == [15, 13, 13, 7, 7]
    first = result["layers"][0]
    assert (first["form"], first["small_side"], first["channels"]) == ("two branches", 3, 64)
    assert first["distances"] == list(range(8))
    for name in ("merged", "large", "small"):
        assert len(first["magnitudes"][name]) == 8
    assert first["magnitudes"]["small"][2:] == [0] * 6
    assert first["energy_within"]["merged"]["15"] == pytest.approx(1)
    assert first["energy_within"]["merged"]["3"] > first["energy_within"]["large"]["3"]
    assert 0 < first["small_share"] < first["small_share_within"]
    assert first["branch_agreement"] > 0


def test_the_table_and_a_choice_of_layers(tmp_path, capsys):
    command = [
        "analyze",
        "kernels",
        "replknet_cifar_l",
        "-o",
        str(tmp_path / "k.png"),
        "--layers",
        "stages.1.*",
        "*.2.blocks.0.*",
    ]
    assert main(command) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["layer", "kernel", "channels"]
    assert [row.split()[0] for row in rows if row.startswith("stages")] == [
        "stages.1.blocks.0.large_kernel",
        "stages.1.blocks.2.large_kernel",
        "stages.2.blocks.0.large_kernel",
    ]
    assert rows[0].split()[1:5] == ["13x13", "128", "65.0%", "3x3"]
    assert rows[-1] == str(tmp_path / "k.png")
    assert main([*command[:-2], "large*"]) == 2
    assert "no layer is called large*; there are stages.0.blocks.0.large_kernel, stages.1" in capsys.readouterr().err


def test_a_merged_file_says_what_is_no_longer_known(tmp_path, capsys):
    model, description = load_model("replknet_cifar_l")
    save_model(merge(model), tmp_path / "merged.safetensors", description)
    assert main(["analyze", "kernels", str(tmp_path / "merged.safetensors"), "-o", str(tmp_path / "k.png")]) == 0
    text = capsys.readouterr().out
    assert "already merged: what the small branch added is no longer known" in text
    assert "agreement" not in text


def test_networks_of_other_tasks(tmp_path, capsys):
    from replknet.tasks.segmentation.files import SegmentationDescription, save_segmentation

    description = SegmentationDescription(
        backbone="replknet_test",
        network={"kernels": (9, 7, 5, 5), "small_kernel": 3},
        classes=("sky", "road"),
        palette=((0, 0, 255), (90, 90, 90)),
        channels=8,
        auxiliary_channels=None,
        align_corners=False,
        scale=None,
        window=None,
        stride=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    file = tmp_path / "m.safetensors"
    save_segmentation(description.build(), file, description)
    assert main(["analyze", "kernels", str(file), "-o", str(tmp_path / "k.png"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["sides"][0] for layer in layers] == [9, 7, 5, 5, 5]
    assert all(layer["form"] == "two branches" for layer in layers)
    assert main(["analyze", "kernels", str(file), "--task", "detection", "-o", str(tmp_path / "k.png")]) == 2
    assert "holds a segmentation network, not a detector" in capsys.readouterr().err


def test_kernels_of_zeros_are_counted(tmp_path, capsys):
    model = timm.create_model("replknet_test", num_classes=10)
    torch.nn.init.zeros_(model.stages[0].blocks[0].large_kernel.lkb_origin.bn.weight)
    torch.nn.init.zeros_(model.stages[0].blocks[0].large_kernel.small_conv.bn.weight)
    save_model(model, tmp_path / "m.safetensors", Description(config=CONFIGS["replknet_test"], num_classes=10))
    assert main(["analyze", "kernels", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "k.png")]) == 0
    assert "left out: 8 kernels that are zero" in capsys.readouterr().out


def test_random_weights_are_shown_only_where_they_are_asked_for(tmp_path, capsys):
    command = ["analyze", "kernels", "test_convnext", "-o", str(tmp_path / "k.png")]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "replknet analyze: test_convnext is a timm model, not a file of weights: --pretrained downloads its trained "
        "weights, --untrained shows random ones\n"
    )
    found = []
    for _ in range(2):
        assert main([*command, "--untrained", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["untrained"]
    assert all(layer["form"] == "convolution" for layer in found[0]["layers"])
    assert all(layer["magnitudes"]["small"] is None for layer in found[0]["layers"])


def test_trained_weights_of_a_timm_model(tmp_path, capsys):
    # those of this one come with the package
    command = ["analyze", "kernels", "replknet_cifar_l", "-o", str(tmp_path / "k.png"), "--json"]
    assert main(command) == 0
    shipped = json.loads(capsys.readouterr().out)
    assert main([*command, "--pretrained"]) == 0
    assert json.loads(capsys.readouterr().out) == shipped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere.pth"],
            "nowhere.pth is no checkpoint file, none of the weights that come with replknet (replknet_cifar_l.cifar10)",
        ),
        (["test_convnxt", "--untrained"], "no model of timm's; did you mean test_convnext, "),
        (["test_convnext", "--untrained", "--pretrained"], "--pretrained and --untrained were both given"),
        (
            ["replknet_b_k7", "--pretrained"],
            "timm cannot build replknet_b_k7 with its trained weights: no weights were released for replknet_b_k7",
        ),
        (["resnet18", "--untrained"], "ResNet has no depthwise convolution"),
        (["replknet_cifar_l", "--min-side", "17"], "no depthwise kernel of 17 pixels or more, the largest has 15"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, capsys):
    assert main(["analyze", "kernels", *words, "-o", str(tmp_path / "k.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "k.png").exists()
