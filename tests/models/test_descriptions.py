"""What a file says about its network is checked before anything of that size is built."""

import json
import os
import time

import pytest
import timm
import torch
from safetensors.torch import save_file

import replknet
from replknet.cli.main import main
from replknet.limits import VARIABLE
from replknet.models import CheckpointError, Description, load_checkpoint, read_state_dict, save_model
from replknet.models.model_files import FIELD, _plain
from replknet.models.replknet import CONFIGS
from replknet.models.strangers import looks_like

DESCRIPTION = Description(config=CONFIGS["replknet_test"], classes=("cat", "dog", "cow"), num_classes=3, image_size=32)
STATE = DESCRIPTION.build().state_dict()
SEGMENTATION = {
    "backbone": "replknet_test", "network": {}, "classes": ["a"], "palette": [[0, 0, 0]], "channels": 16,
    "auxiliary_channels": None, "align_corners": False, "scale": None, "window": None, "stride": None,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip
DETECTION = {
    "backbone": "replknet_test", "network": {}, "classes": ["a"], "detector": "fcos", "channels": 32,
    "scale": [64, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip


def described(path, field=FIELD, **changes):
    """A file of weights whose description has other values."""
    fields = {FIELD: json.loads(json.dumps(_plain(DESCRIPTION))), **OTHERS}[field]
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        fields = {**fields, outer: {**fields[outer], inner: value} if inner else value}
    save_file(STATE, path, metadata={field: json.dumps(fields)})
    return path


OTHERS = {f"{FIELD}_segmentation": SEGMENTATION, f"{FIELD}_detection": DETECTION}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config__depths": [1_000_000, 1, 1, 1]}, "asks for 1,000,003 in depths, more than the 200 allowed"),
        ({"config__channels": [10**9] * 4}, "asks for 1,000,000,000 in channels, more than the 65,536 allowed"),
        ({"config__kernels": [10**6 + 1] * 4}, "asks for 1,000,001 in kernels, more than the 255 allowed"),
        ({"config__ffn_ratio": 1e9}, "asks for 1,000,000,000 in ffn_ratio, more than the 100 allowed"),
        ({"image_size": 20_000}, "asks for 20,000 pixels a side of an image, more than the 8,192 allowed"),
        ({"num_classes": 10**9, "classes": []}, "asks for 1,000,000,000 classes, more than the 200,000 allowed"),
        ({"in_chans": 10**7}, "asks for 10,000,000 channels of an image"),
        ({"classes": ["x" * 5000, "a", "b"]}, "asks for 5,000 letters in the name of a class, more than the 1,000"),
        ({"classes": ["a"]}, "1 classes have names, and the network has 3 outputs"),
        ({"classes": "cat"}, "classes in the description must be a list of texts, got 'cat'"),
        ({"crop_pct": 1e-9}, "crop_pct must be from 0.1 to 1, got 1e-09"),
        ({"crop_pct": float("nan")}, "crop_pct in the description must be a number, got nan"),
        ({"image_size": 224.5}, "image_size in the description must be a whole number, got 224.5"),
        ({"mean": [0.5]}, r"mean and std must have a number for each channel, .* got \(0.5,\)"),
        ({"std": [0, 0, 0]}, "std must be positive"),
        ({"family": ["replknet"]}, r"no family is called \['replknet'\]; there are replknet, mobilenetv2"),
        ({"config": 3}, "the config must be an object, got 3"),
        ({"config__small_kernel": "3"}, "small_kernel in the config must be a whole number or null, got '3'"),
        ({"surprise": 1}, "the description has the unknown field surprise; known are config, in_chans"),
    ],
)
def test_a_description_of_a_classifier(tmp_path, changes, told):
    path = described(tmp_path / "x.safetensors", **changes)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"x\.safetensors .*{told}"):
        replknet.load(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": {"depths": [10**6] * 4}}, "asks for 4,000,000 in depths, more than the 200 allowed"),
        ({"network": {"pretrained": True}}, "a file of weights must not set pretrained, which fetches other files"),
        ({"network": {"pretrained_cfg_overlay": {"file": "x"}}}, "must not set pretrained_cfg_overlay"),
        ({"network": {"checkpoint_path": "/etc/passwd"}}, "must not set checkpoint_path"),
        ({"network": {"no_such_option": 1}}, "unexpected keyword argument 'no_such_option'"),
        ({"backbone": "hf-hub:somebody/network"}, "no network of timm's is called hf-hub:somebody/network"),
        ({"backbone": "local-dir:/data/network"}, "no network of timm's is called local-dir:/data/network"),
        ({"backbone": "\x1b[2J"}, r"no network of timm's is called \\x1b\[2J"),
        ({"channels": 10**9}, "asks for 1,000,000,000 pixels a side, or channels of a head, more than the 8,192"),
        ({"channels": -1}, "sides and channels must be positive, got -1"),
        ({"scale": [10**6, 10]}, "asks for 1,000,000 pixels a side"),
        ({"scale": [1, 2, 3]}, "scale in the description must be a list of 2 whole numbers"),
    ],
)
def test_a_description_of_a_backbone_with_a_head(tmp_path, field, changes, told):
    with pytest.raises(CheckpointError, match=rf"x\.safetensors .*{told}"):
        replknet.load(described(tmp_path / "x.safetensors", field, **changes))


def test_a_detector_that_is_larger_than_its_file_takes_no_memory(tmp_path):
    path = described(tmp_path / "x.safetensors", f"{FIELD}_detection", channels=8192)
    with pytest.raises(CheckpointError, match="weights, for the number in the file, more than the"):
        replknet.load(path)


def test_limits_can_be_raised(tmp_path, monkeypatch):
    path = described(tmp_path / "x.safetensors", image_size=20_000)
    monkeypatch.setenv(VARIABLE, "3")
    replknet.load(path)


def test_weights_that_are_no_numbers_with_a_fraction_are_named(tmp_path):
    state = {**STATE, "head.weight": STATE["head.weight"].int()}
    save_file(state, tmp_path / "x.safetensors", metadata={FIELD: json.dumps(_plain(DESCRIPTION))})
    with pytest.raises(
        CheckpointError, match=r"head\.weight is torch\.int32 in the file: expected numbers with a fract"
    ):
        replknet.load(tmp_path / "x.safetensors")


def test_a_description_that_is_no_json(tmp_path):
    for text in ("{", "[" * 100_000, "3", "\0"):
        save_file(STATE, tmp_path / "x.safetensors", metadata={FIELD: text})
        with pytest.raises(
            CheckpointError, match=r"x\.safetensors cannot be read as a network of replknet's: "
        ) as error:
            replknet.load(tmp_path / "x.safetensors")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "seems"),
    [
        ("convnext_atto", "ConvNeXt"),
        ("vit_tiny_patch16_224", "a vision transformer"),
        ("swin_tiny_patch4_window7_224", "a Swin Transformer"),
        ("resnet18", "ResNet"),
        ("mobilenetv2_100", "MobileNet or EfficientNet"),
        ("efficientnet_b0", "MobileNet or EfficientNet"),
    ],
)
def test_weights_of_another_network_are_told_apart(name, seems, tmp_path):
    with torch.device("meta"):
        keys = timm.create_model(name).state_dict()
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"its keys look like {seems}.*, which replknet cannot load") as error:
        load_checkpoint(DESCRIPTION.build(), tmp_path / "x.pth")
    assert "merge" not in str(error.value)
    with pytest.raises(CheckpointError, match=f"its keys look like {seems}"):
        replknet.load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("keys", "seems"),
    [
        # AILab-CVC/UniRepLKNet, before and after its own merging
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.lk_origin.weight"], "UniRepLKNet"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.0.0.se.down.weight"], "UniRepLKNet"),
        # VITA-Group/SLaK
        (["downsample_layers.0.0.weight", "stages.0.0.large_kernel.LoRA1.conv.weight"], "SLaK"),
        # facebookresearch/ConvNeXt
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.0.0.pwconv1.weight"], "ConvNeXt"),
    ],
)  # fmt: skip
def test_official_keys_of_large_kernel_networks_are_told_apart(keys, seems):
    assert looks_like(keys) == seems
    assert looks_like([f"module.{key}" for key in keys]) == seems


def test_our_own_keys_look_like_no_stranger():
    for name in replknet.models.NETWORKS:
        with torch.device("meta"):
            assert looks_like(timm.create_model(name).state_dict()) is None


AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")


@pytest.mark.parametrize("raw", ["state_dict", "model"])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_average_of_the_weights_comes_first_as_in_timm(average, raw, tmp_path, caplog):
    caplog.set_level("INFO", "replknet")
    content = {raw: {"a": torch.zeros(1)}, average: {"module.a": torch.ones(1), "module.b": torch.ones(1)}}
    torch.save(content, tmp_path / "x.pth")
    assert sum(read_state_dict(tmp_path / "x.pth").values()) == 2
    assert caplog.messages == [
        f"{tmp_path}/x.pth: took the average of the weights, {average}; load_checkpoint(..., average=False) takes {raw}"
    ]
    assert read_state_dict(tmp_path / "x.pth", average=False)["a"] == 0
    assert (
        caplog.messages[1]
        == f"{tmp_path}/x.pth: took the weights, {raw}; load_checkpoint(..., average=True) takes {average}"
    )


@pytest.mark.parametrize("average", AVERAGES)
def test_a_file_with_the_average_alone_is_read(average, tmp_path, caplog):
    caplog.set_level("INFO", "replknet")
    counted = {"steps": torch.tensor(3)} if average == "ema_state_dict" else {}
    torch.save({average: {**counted, "module.a": torch.ones(1)}, "state_dict": {}}, tmp_path / "x.pth")
    for wanted in (True, False):
        assert read_state_dict(tmp_path / "x.pth", average=wanted) == {"a": torch.ones(1)}
    assert caplog.messages == []


def test_load_checkpoint_takes_either(tmp_path):
    model, averaged = (DESCRIPTION.build() for _ in range(2))
    torch.save({"model": model.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "x.pth")
    new = DESCRIPTION.build()
    for average, expected in ((True, averaged), (False, model)):
        load_checkpoint(new, tmp_path / "x.pth", average=average)
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in new.state_dict().items())


def test_names_that_are_no_utf8_work(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9 \x1b[31m")
    save_model(DESCRIPTION.build(), folder / "a\udcff.safetensors", DESCRIPTION)
    assert replknet.load(folder / "a\udcff.safetensors").num_classes == 3
    for legacy in (False, True):
        with (folder / "a\udcff.pth").open("wb") as file:
            torch.save(STATE, file, _use_new_zipfile_serialization=not legacy)
        assert read_state_dict(folder / "a\udcff.pth").keys() == STATE.keys()
    (folder / "a\udcff.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"/caf\\xe9 \\x1b\[31m/a\\xff\.pth cannot be read as weights"):
        replknet.load(folder / "a\udcff.pth")


def test_a_command_says_which_weights_it_took(tmp_path, capsys):
    content = {"model": DESCRIPTION.build().state_dict(), "model_ema": DESCRIPTION.build().state_dict()}
    torch.save(content, tmp_path / "x.pth")
    assert main(["merge", str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors")]) == 0
    told = "took the average of the weights, model_ema; load_checkpoint(..., average=False) takes model"
    assert capsys.readouterr().err == f"replknet merge: {tmp_path}/x.pth: {told}\n"
