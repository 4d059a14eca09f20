"""Segmentation trained through `fit`: from weights, resumed, in two processes; and the commands around it."""

import json
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from processes import train_in_two, without_statistics
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.models import CheckpointError, Description, save_model
from replknet.models.replknet import CONFIGS
from replknet.tasks import RECIPES
from replknet.tasks.segmentation import heads
from replknet.tasks.segmentation.files import load_segmentation
from replknet.tasks.segmentation.infer import Inference
from replknet.tasks.segmentation.infer import predict as predicted
from replknet.tasks.segmentation.recipes import SegmentationOptions
from replknet.tasks.segmentation.train import Segmentation
from replknet.tasks.training import fit
from replknet.train.backbones import load_backbone
from replknet.train.fit import ResumeError
from replknet.train.recipe import Recipe
from scenes import CLASSES

RECIPE = Recipe(
    model="replknet_test", samples=24, batch_size=4, lr=5e-3, workers=0,
    options=SegmentationOptions(
        dataset="masks", crop=(32, 48), ratio=(0.75, 1.5), channels=16, auxiliary_channels=8
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_and_interruptible(monkeypatch):
    monkeypatch.setenv("CI", "true")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def curve(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_it_learns_and_the_commands_use_it(scenes, tmp_path, capsys):
    recipe = RECIPE.changed(samples=12 * 12, lr=2e-2, evaluate_every=5, ratio=(1.0, 1.0))
    weights = str(fit(recipe, tmp_path, scenes))
    rows = curve(tmp_path)
    # scored every fifth epoch and at the end
    assert [row["epoch"] for row in rows if "val_miou" in row] == [4, 9, 11]
    # in 36 steps sky and grass, which are most of the pixels
    assert rows[-1]["val_accuracy"] > 0.75
    assert (tmp_path / "best.safetensors").exists()
    capsys.readouterr()
    command = ["eval", "--task", "segmentation", weights, "--data", str(scenes)]
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 5
    assert scores["miou"] == pytest.approx(rows[-1]["val_miou"], abs=1e-3)
    # two rows of each image have no label
    assert sum(map(sum, scores["confusion"])) == 5 * 38 * 60
    assert main([*command, "--split", "test", "--window", "32", "--ratios", "[0.75, 1.25]", "--flip"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("3 images  mIoU ")
    assert [line.split()[0] for line in out[2:]] == CLASSES["classes"]
    _check_predict(weights, scenes, tmp_path, capsys)


def _check_predict(weights, scenes, folder, capsys):
    image = str(scenes / "images" / "val" / "0.png")
    predict = ["predict", "--task", "segmentation", weights]
    assert main([*predict, image, "-o", str(folder / "overlay.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, description = load_segmentation(weights)
    source = Image.open(image)
    labels = predicted(model, source, description, Inference())
    assert found["picture"] == str(folder / "overlay.png")
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["grass"] == pytest.approx((labels == 0).float().mean().item())
    with Image.open(folder / "overlay.png") as overlay:
        # the image as large as it is, and a legend beside it
        assert overlay.height == 40
        assert overlay.width > 60 + 100
        drawn = np.array(overlay.convert("RGB"))[:, :60].astype(float)
    mixed = np.array(source) / 2 + np.array(CLASSES["palette"])[labels.numpy()] / 2
    assert abs(drawn - mixed).mean() < 2
    photos = [str(photo) for photo in PHOTOS]
    assert main([*predict, *photos, "-o", str(folder / "all")]) == 0
    assert sorted(p.name for p in (folder / "all").iterdir()) == sorted(p.with_suffix(".png").name for p in PHOTOS)
    capsys.readouterr()
    for wrong, text in (
        ([*predict, *photos, "-o", str(folder / "one.png")], "2 images need a folder for their pictures"),
        (
            [*predict, image, str(scenes / "images" / "train" / "0.png"), "-o", str(folder)],
            "two of the images are called 0",
        ),
        (
            ["predict", "replknet_cifar_l", image, "-o", "x.png"],
            "is a classifier, which has no pictures: leave out -o",
        ),
        ([*predict[:-1], "replknet_cifar_l", image], "holds a classifier, not a segmentation network"),
        (["eval", "--task", "segmentation", weights], "name the folder or zip of the images and masks with --data"),
        (["eval", weights, "--dataset", "cifar10"], "--dataset takes one of ade20k, cityscapes, masks, got cifar10"),
        (["eval", "replknet_cifar_l", "--dataset", "ade20k"], "--dataset takes one of cifar10, folder, got ade20k"),
    ):
        assert main(wrong) == 2
        assert text in capsys.readouterr().err
    other = folder / "other"
    other.mkdir()
    for kind in ("images", "annotations"):
        (other / kind).symlink_to(scenes / kind)
    (other / "classes.json").write_text(json.dumps(CLASSES | {"classes": ["a", "b", "c"]}))
    assert main(["eval", "--task", "segmentation", weights, "--data", str(other)]) == 2
    assert "the network has the classes grass, sky, sun, ..., and" in capsys.readouterr().err


def test_interrupted_it_goes_on_to_the_same_weights(scenes, tmp_path, monkeypatch):
    fit(RECIPE, tmp_path / "whole", scenes)
    real, calls = Segmentation.training_step, []

    def step(self, *args):
        calls.append(0)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path / "parts", scenes)
    with pytest.raises(ResumeError, match=r"lr was 0\.005, now 0\.1"):
        fit(RECIPE.changed(lr=0.1), tmp_path / "parts", scenes, resume=True)
    fit(RECIPE, tmp_path / "parts", scenes, resume=True)
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts")]
    assert states[0]["global_step"] == states[1]["global_step"] == 6
    assert all(torch.equal(states[1]["state_dict"][key], value) for key, value in states[0]["state_dict"].items())
    rows = [[{**row, "seconds": 0} for row in curve(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]


@pytest.mark.full
def test_two_processes_train_and_count_what_one_does(scenes, tmp_path, monkeypatch):
    # what differs are sums in another order; each of the pixels of five images is counted once, and one of the
    # processes has three of them
    recipe = RECIPE.changed(optimizer="sgd", lr=1e-3)
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", without_statistics)
    monkeypatch.setattr(heads, "_DROPOUT", 0.0)
    fit(recipe, tmp_path / "one", scenes)
    for shard in (False, True):
        train_in_two(recipe, tmp_path / str(shard), scenes, shard)
        for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / str(shard)), strict=True):
            assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
            assert one["val_miou"] == pytest.approx(two["val_miou"], abs=2e-3)
            assert one["val_accuracy"] == pytest.approx(two["val_accuracy"], abs=2e-3)


def test_a_backbone_starts_from_a_classifier_strictly(tmp_path):
    classifier = timm.create_model("replknet_test", num_classes=7)
    file = tmp_path / "c.safetensors"
    save_model(classifier, file, Description(config=CONFIGS["replknet_test"], num_classes=7))
    for options in ({}, {"norm_intermediate_features": True}):
        backbone = timm.create_model("replknet_test", features_only=True, **options).model
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        load_backbone(backbone, file)
        own, theirs = backbone.state_dict(), classifier.state_dict()
        for key, value in own.items():
            assert torch.equal(value, before[key] if key.split(".")[2] == "norm" else theirs[key])
    # the official code loads with strict=False and says nothing
    other = timm.create_model("replknet_test", features_only=True, kernels=(7, 7, 5, 5)).model
    with pytest.raises(
        CheckpointError, match=r"does not fit the backbone RepLKNet: stages\.0\.blocks\.0\.large_kernel"
    ):
        load_backbone(other, file)
    small = timm.create_model("mobilenetv2_lk", width=0.25)
    save_model(small, file, Description(config=small.cfg))
    load_backbone(timm.create_model("mobilenetv2_lk", width=0.25, features_only=True, out_indices=(6,)).model, file)
    load_backbone(timm.create_model("replknet_cifar_l", features_only=True, stem_stride=4).model, "replknet_cifar_l")


def test_the_papers_recipes_are_the_official_configurations():
    # steps x GPUs x crops, side, drop path, warm-up steps, windows
    official = {
        "ade20k_31b_512": (40_000 * 64 * 2, 512, 0.5, 400, None, None),
        "ade20k_31b_640": (40_000 * 64 * 2, 640, 0.3, 400, 640, 426),
        "ade20k_31l_640": (80_000 * 64, 640, 0.3, 800, 640, 426),
        "ade20k_xl_640": (160_000 * 16 * 2, 640, 0.5, 1500, 640, 426),
        "cityscapes_31b_769": (20_000 * 32 * 2, 769, 0.5, 400, None, None),
    }
    for name, expected in official.items():
        r, o = RECIPES[name](), RECIPES[name]().options
        warmup = r.warmup_samples // r.batch_size
        assert (r.samples, o.crop[0], r.drop_path, warmup, o.window, o.stride) == expected
        assert (r.lr, r.weight_decay, r.optimizer, o.largest_share, o.ratio) == (2e-4, 0.05, "adamw", 0.75, (0.5, 2.0))
        assert (o.channels, o.auxiliary_channels, r.sync_bn, r.finetune) == (512, 256, True, True)
        assert o.align_corners == (o.dataset == "cityscapes")
    xl = RECIPES["ade20k_xl_640"]()
    assert (xl.normalization, xl.network) == ("inception", {"norm_intermediate_features": True})


def test_what_cannot_be_trained_is_an_error(scenes, tmp_path):
    for changes, text in (
        ({"model": "resnet18"}, "model must be one of replknet's, got 'resnet18'"),
        ({"network": {"kernel": 3}}, r"replknet_test cannot be built with \{'kernel': 3\}"),
        ({"finetune": True}, "name the checkpoint it starts from with --weights FILE"),
        ({"sync_bn": True}, "sync_bn needs GPUs"),
        ({"batch_size": 1}, r"a process takes one crop at once, and a batch norm needs two.*: give a larger --batch"),
    ):
        if "sync_bn" in changes and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=text):
            fit(RECIPE.changed(**changes), tmp_path, scenes)
    with pytest.raises(ValueError, match="name their folder or zip with --data"):
        fit(RECIPE, tmp_path, None)
    for changes, text in (
        ({"samples": 0}, "samples must be positive, got 0"),
        ({"warmup_samples": 24}, "warmup_samples must be below the 24 samples, got 24"),
        ({"ratio": (2.0, 1.0)}, "ratio ascending"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"workers": -1}, "workers must not be negative"),
    ):
        with pytest.raises(ValueError, match=text):
            RECIPE.changed(**changes)


def test_the_command_trains_and_its_config_is_read(scenes, tmp_path, capsys):
    options = [
        "--data",
        str(scenes),
        "--model",
        "replknet_test",
        "--weights",
        "null",
        "--network",
        "null",
        "--samples",
        "12",
    ]
    options += ["--warmup-samples", "0", "--batch-size", "4", "--crop", "[32, 32]", "--channels", "8"]
    assert main(["train", "camvid", *options, "--print-config"]) == 0
    config = tmp_path / "config.json"
    config.write_text(capsys.readouterr().out)
    assert json.loads(config.read_text())["crop"] == [32, 32]
    out = tmp_path / "run"
    assert main(["train", "camvid", "--config", str(config), "--data", str(scenes), "--output", str(out)]) == 0
    model, description = load_segmentation(out / "model.safetensors")
    assert (description.channels, model.num_classes) == (8, 3)
    capsys.readouterr()
    assert main(["train", "--dataset", "cifar10", "folder", "--data", "x"]) == 2
    assert "name the recipe before the options: replknet train folder" in capsys.readouterr().err
    model.train()
    merged = tmp_path / "merged.safetensors"
    command = ["--task", "segmentation", str(out / "model.safetensors")]
    assert main(["merge", *command, str(merged), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["differences"]["random"]["inputs"], found["differences"]["images"]["inputs"]) == (2, len(PHOTOS))
    assert load_segmentation(merged)[1] == description
    assert found["parameters_after"] < found["parameters_before"] == sum(p.numel() for p in model.parameters())
    assert main(["erf", *command, "--size", "64", "-o", str(tmp_path / "erf.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(PHOTOS)
