"""Detectors trained through `fit`: from weights, resumed, in two processes; and the commands around them."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import replknet
from matrix import matrix
from processes import train_in_two, without_statistics
from replknet.cli.main import main
from replknet.data.images import PHOTOS, ImageError
from replknet.models import CheckpointError, Description, load_model, save_model
from replknet.models.detection_keys import to_mmdet
from replknet.models.model_files import write
from replknet.models.replknet import CONFIGS
from replknet.tasks import RECIPES
from replknet.tasks.detection.cascade import CascadeRCNN
from replknet.tasks.detection.fcos import FCOS
from replknet.tasks.detection.files import DetectionDescription, load_detection, save_detection
from replknet.tasks.detection.infer import predict
from replknet.tasks.detection.recipes import DetectionOptions
from replknet.tasks.detection.train import Detection
from replknet.tasks.training import fit
from replknet.train.guard import LossError
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe

CLASSES = ("square", "bar")
COLOURS = ((220, 40, 40), (40, 40, 220))
RECIPE = Recipe(
    model="replknet_test", samples=24, batch_size=4, lr=5e-3, workers=0,
    options=DetectionOptions(detector="fcos", scales=((96, 64), (120, 80)), scale=(96, 64), channels=32),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_and_interruptible(monkeypatch):
    monkeypatch.setenv("CI", "true")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Red squares and blue bars on grey, in COCO's layout with polygons."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "annotations").mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5), ("test", 3)):
        images, annotations = [], []
        (folder / split).mkdir()
        for i in range(count):
            picture = np.full((64, 96, 3), 128, np.uint8)
            # the last image has nothing in it
            for label in range(2) if i < count - 1 else ():
                w, h = ((20, 20), (32, 12))[label]
                x, y = int(random.integers(0, 96 - w)), int(random.integers(32 * label, 32 * label + 32 - h))
                picture[y : y + h, x : x + w] = COLOURS[label]
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": 5 + 2 * label, "bbox": [x, y, w, h],
                     "area": w * h, "iscrowd": 0, "segmentation": [polygon]}
                )  # fmt: skip
            Image.fromarray(picture).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 5 + 2 * i, "name": name} for i, name in enumerate(CLASSES)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def curve(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.full
def test_it_learns_and_the_commands_use_it(shapes, tmp_path, capsys):
    recipe = RECIPE.changed(
        scales=((96, 64),), samples=40 * 11, drops=(32 * 11,), lr=4e-3, evaluate_every=20, warmup_samples=22
    )
    weights = str(fit(recipe, tmp_path, shapes))
    rows = curve(tmp_path)
    assert [row["epoch"] for row in rows if "val_map" in row] == [19, 39]
    assert rows[-1]["val_map50"] > 0.3
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    assert (tmp_path / "curve.png").exists()
    capsys.readouterr()
    command = ["eval", "--task", "detection", weights, "--data", str(shapes)]
    assert main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["images"], scores["masks"]) == (5, None)
    assert scores["boxes"]["map"] == pytest.approx(rows[-1]["val_map"], abs=1e-6)
    assert main([*command, "--split", "test"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 images"
    assert out[1].startswith("boxes  AP ")
    assert [line.split()[0] for line in out[2:]] == list(CLASSES)
    _check_predict(weights, shapes, tmp_path, capsys)
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", "--task", "detection", weights, str(merged), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters_after"] < found["parameters_before"]
    assert max(part["relative_l2"] for part in found["differences"].values()) < 2e-5
    model, description = load_detection(merged)
    (image, other) = (predict(m, Image.open(PHOTOS[0]), description) for m in (model, load_detection(weights)[0]))
    torch.testing.assert_close(image["boxes"], other["boxes"], rtol=1e-3, atol=1e-2)
    erf = ["erf", "--task", "detection", weights, "--size", "64", "-o", str(tmp_path / "erf.png"), "--json"]
    assert main(erf) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(PHOTOS)


def _check_predict(weights, shapes, folder, capsys):
    image = str(shapes / "val" / "0.png")
    command = ["predict", "--task", "detection", weights]
    assert main([*command, image, "-o", str(folder / "boxes.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, description = load_detection(weights)
    expected = predict(model, Image.open(image), description)
    kept = [score for score in expected["scores"].tolist() if score >= 0.3]
    assert [one["score"] for one in found["objects"]] == pytest.approx(kept, abs=1e-5)
    assert {one["class"] for one in found["objects"]} <= set(CLASSES)
    assert found["picture"] == str(folder / "boxes.png")
    with Image.open(folder / "boxes.png") as picture:
        assert picture.size == (96, 64)
    assert main([*command, image, "--min-score", "1"]) == 0
    assert capsys.readouterr().out == f"{image}: nothing\n"
    for wrong, text in (
        (["eval", "--task", "detection", weights], "name the folder or zip of the images and annotations with --data"),
        (["eval", "--task", "detection", weights, "--dataset", "masks"], "is a detector: leave out --dataset"),
        (["eval", weights, "--task", "classification"], "holds a detector, not a classifier"),
        (["predict", "--task", "detection", "replknet_cifar_l", image], "holds a classifier, not a detector"),
    ):
        assert main(wrong) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "detector",
    matrix(["torchvision_fcos", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"], ["cascade_mask_rcnn"]),
)
def test_every_detector_trains_and_comes_back(detector, shapes, tmp_path, capsys):
    # torchvision's norms refuse two channels a group on a map of one pixel
    channels = 64 if detector == "torchvision_fcos" else 32
    recipe = RECIPE.changed(detector=detector, channels=channels, samples=11, precision="bf16-mixed")
    weights = fit(recipe, tmp_path, shapes)
    (row,) = curve(tmp_path)
    assert ("val_map_masks" in row) == ("mask" in detector)
    model, description = load_detection(weights)
    assert (description.detector, description.masks) == (detector, "mask" in detector)
    found = predict(model, Image.open(shapes / "val" / "0.png"), description)
    if description.masks:
        assert found["masks"].shape == (len(found["scores"]), 64, 96)
    save_detection(model, tmp_path / "again.safetensors", description)
    again, _ = load_detection(tmp_path / "again.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.full
def test_interrupted_it_goes_on_to_the_same_weights(shapes, tmp_path, monkeypatch):
    fit(RECIPE, tmp_path / "whole", shapes)
    real, calls = Detection.training_step, []

    def step(self, *args):
        calls.append(0)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Detection, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path / "parts", shapes)
    fit(RECIPE, tmp_path / "parts", shapes, resume=True)
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts")]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    assert all(torch.equal(states[1]["state_dict"][key], value) for key, value in states[0]["state_dict"].items())
    rows = [[{**row, "seconds": 0} for row in curve(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]


@pytest.mark.full
def test_two_processes_train_and_count_what_one_does(shapes, tmp_path, monkeypatch):
    # one size, so that no process fills up its batch to another one; the validation has five images
    recipe = RECIPE.changed(scales=((96, 64),), optimizer="sgd", lr=1e-3)
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", without_statistics)
    fit(recipe, tmp_path / "one", shapes)
    train_in_two(recipe, tmp_path / "two", shapes)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
        assert one["val_map"] == pytest.approx(two["val_map"], abs=5e-3)


def test_it_starts_from_a_classifier_and_malformed_annotations_are_left_out_when_asked(shapes, tmp_path, capsys):
    classifier = timm.create_model("replknet_test", num_classes=7)
    file = tmp_path / "c.safetensors"
    save_model(classifier, file, Description(config=CONFIGS["replknet_test"], num_classes=7))
    broken = tmp_path / "broken"
    (broken / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (broken / split).symlink_to(shapes / split)
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        content["annotations"][0]["bbox"][2] = -3
        (broken / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    recipe = RECIPE.changed(weights=str(file), samples=11, lr=1e-9)
    with pytest.raises(ImageError, match=r"box without width or height \(1\): 1; correct it, or leave it out"):
        fit(recipe, tmp_path / "run", broken)
    weights = fit(recipe.changed(malformed="skip"), tmp_path / "run", broken)
    assert "left out of train: annotation with a box without width or height (1): 1" in capsys.readouterr().err
    own = load_detection(weights)[0].state_dict()
    key = "stages.2.blocks.0.pw1.conv.weight"
    torch.testing.assert_close(own[f"pyramid.backbone.model.{key}"], classifier.state_dict()[key])
    command = ["eval", "--task", "detection", str(weights), "--data", str(broken)]
    assert main(command) == 2
    assert "with a box without width or height (1): 1" in capsys.readouterr().err
    assert main([*command, "--malformed", "skip"]) == 0
    assert "left out: annotation with a box" in capsys.readouterr().err


def test_an_official_file_is_a_detector(tmp_path, monkeypatch):
    monkeypatch.setattr("replknet.tasks.detection.files.shipped_classes", lambda: CLASSES)
    torch.manual_seed(0)
    model = FCOS(timm.create_model("replknet_test", features_only=True), 2, 32).eval()
    torch.save({"meta": {}, "state_dict": to_mmdet(model.state_dict())}, tmp_path / "epoch_24.pth")
    loaded, description = load_detection(tmp_path / "epoch_24.pth")
    assert (description.detector, description.backbone, description.channels) == ("fcos", "replknet_test", 32)
    x = [torch.randn(3, 64, 96)]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x))
    three = FCOS(timm.create_model("replknet_test", features_only=True), 3, 32)
    torch.save(to_mmdet(three.state_dict()), tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match="has 3 classes and does not say which: expected the 2 of COCO"):
        load_detection(tmp_path / "three.pth")
    save_detection(model, tmp_path / "own.safetensors", description)
    with pytest.raises(CheckpointError, match=r"holds no classifier but a network for detection: replknet\.load reads"):
        load_model(tmp_path / "own.safetensors")
    fields = {**dataclasses.asdict(description), "mean": None}
    write(model, tmp_path / "own.safetensors", {"replknet_detection": json.dumps(fields)})
    with pytest.raises(CheckpointError, match="mean in the description must be a list of numbers, got None"):
        load_detection(tmp_path / "own.safetensors")


def test_an_official_cascade_is_a_detector_in_every_form(tmp_path):
    torch.manual_seed(0)
    model = CascadeRCNN(timm.create_model("replknet_test", features_only=True), 80, True, 16).eval()
    for form in (model, replknet.merge(model, fold_bn=False), replknet.merge(model)):
        theirs = to_mmdet(form.state_dict())
        torch.save({"meta": {}, "state_dict": theirs}, tmp_path / "epoch_36.pth")
        loaded, description = load_detection(tmp_path / "epoch_36.pth")
        assert (description.detector, description.backbone) == ("cascade_mask_rcnn", "replknet_test")
        # read, and written back
        again = to_mmdet(loaded.state_dict())
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[key], value) for key, value in theirs.items())


def test_the_papers_recipes_are_the_official_configurations():
    # epochs, drops, drop path, images at which the learning rate has risen, images a step
    official = {
        "coco_fcos_31b": (24, (16, 22), 0.5, 500, 16, 2e-4),
        "coco_cascade_31b": (36, (27, 33), 0.6, 500, 32, 4e-4),
        "coco_cascade_31b_22k": (36, (27, 33), 0.4, 500, 32, 4e-4),
        "coco_cascade_31l": (36, (27, 33), 0.7, 500, 32, 4e-4),
        "coco_cascade_xl": (36, (27, 33), 0.5, 500, 32, 4e-4),
    }
    for name, expected in official.items():
        r = RECIPES[name]()
        images = 117_266
        drops = tuple(drop / images for drop in r.options.drops)
        warmup, o = r.warmup_samples // r.batch_size, r.options
        assert (r.epochs_of(images), drops, r.drop_path, warmup, r.batch_size, r.lr) == expected
        assert (r.weight_decay, r.optimizer, r.sync_bn, r.finetune, o.scale) == (0.05, "adamw", True, True, (1333, 800))
        fcos = o.detector == "fcos"
        assert (o.warmup, r.clip_grad) == (("constant", 35.0) if fcos else ("linear", None))
        assert o.warmup_start == pytest.approx(1 / 3 if fcos else 1e-3)
        assert len(o.scales) == (2 if fcos else 11)
    xl = RECIPES["coco_cascade_xl"]()
    assert (xl.normalization, xl.network) == ("inception", {"norm_intermediate_features": True})


@pytest.mark.parametrize("warmup", ["linear", "constant"])
def test_the_learning_rate_rises_and_falls_in_steps(warmup):
    description = DetectionDescription(
        detector="fcos", backbone="replknet_test", network={}, classes=CLASSES, channels=32, scale=(96, 64),
        mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    task = Detection(
        description.build(), classes=2, masks=False, optimizer="adamw", lr=0.1, warmup=warmup, warmup_start=0.2,
        warmup_steps=4, drops=(0.5, 0.75), weight_decay=0.05, backbone_lr=0.5,
    )  # fmt: skip
    task._trainer = type("T", (), {"estimated_stepping_batches": 16})()
    found = task.configure_optimizers()
    factor = found["lr_scheduler"]["scheduler"].lr_lambdas[0]
    rising = [0.2, 0.4, 0.6, 0.8] if warmup == "linear" else [0.2] * 4
    assert [factor(i) for i in range(16)] == pytest.approx(rising + [1.0] * 4 + [0.1] * 4 + [0.01] * 4)
    groups = found["optimizer"].param_groups
    assert sorted({(g["initial_lr"], g["weight_decay"]) for g in groups}) == [
        (0.05, 0),
        (0.05, 0.05),
        (0.1, 0),
        (0.1, 0.05),
    ]


def test_what_cannot_be_trained_is_an_error(shapes, tmp_path, capsys):
    for changes, text in (
        ({"model": "resnet18"}, "model must be one of replknet's, got 'resnet18'"),
        ({"network": {"kernel": 3}}, "replknet_test cannot be built with"),
        ({"finetune": True}, "name the checkpoint it starts from with --weights FILE"),
    ):
        with pytest.raises(ValueError, match=text):
            fit(RECIPE.changed(**changes), tmp_path, shapes)
    with pytest.raises(ValueError, match="name their folder or zip with --data"):
        fit(RECIPE, tmp_path, None)
    with pytest.raises(ValueError, match="shard was never tried with a detector"):
        fit(RECIPE, tmp_path, shapes, hardware=Hardware(devices=2, shard=True))
    with pytest.raises(ValueError, match=r"torch\.compile takes no network whose shapes depend on what it finds"):
        fit(RECIPE, tmp_path, shapes, hardware=Hardware(compile=True))
    for changes, text in (
        ({"samples": 0}, "samples must be positive, got 0"),
        ({"warmup_samples": 24}, "warmup_samples must be below the 24 samples, got 24"),
        ({"flip": 2.0}, "flip must be from 0 to 1, got 2"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"workers": -1}, "workers must not be negative"),
    ):
        with pytest.raises(ValueError, match=text):
            RECIPE.changed(**changes)
    assert main(["train", "bccd", "--plan"]) == 2
    assert "there is no estimate for a detector" in capsys.readouterr().err


def test_a_loss_that_is_no_number_leaves_its_batch(shapes, tmp_path, monkeypatch):
    real = Detection.training_step
    monkeypatch.setattr(Detection, "training_step", lambda self, *args: real(self, *args) * float("nan"))
    monkeypatch.setattr(Detection, "last_loss", torch.tensor(float("nan")), raising=False)
    with pytest.raises(LossError, match="its batch is in"):
        fit(RECIPE.changed(lr=1e12, clip_grad=None), tmp_path, shapes)
    batch = load_file(tmp_path / "bad_batch.safetensors")
    assert {"images.0", "labels.0.boxes", "labels.0.labels"} <= set(batch)
