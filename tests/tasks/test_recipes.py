"""The presets: what the official commands say, and texts that say whose figure a score is."""

import json
from inspect import cleandoc
from itertools import pairwise

import pytest
import timm

from replknet.cli.main import main
from replknet.tasks import RECIPES
from replknet.tasks.classification.recipes import cifar10
from replknet.train.hardware import Hardware

# README of the official code: GPUs x images x accumulated, lr, drop path, epochs, warm-up, decay, mixup, cutmix,
# average, layer decay, pixels
OFFICIAL = {
    "imagenet1k_31b_224": (8 * 64 * 4, 4e-3, 0.5, 300, 10, 0.05, 0.8, 1.0, True, None, 224),
    "imagenet1k_31b_384": (32 * 32, 4e-4, 0.8, 30, 1, 1e-8, 0, 0, True, 0.7, 384),
    "imagenet22k_31b_224": (128 * 32, 4e-3, 0.1, 90, 5, 0.05, 0.8, 1.0, False, None, 224),
    "imagenet22k_31l_224": (128 * 32, 4e-3, 0.1, 90, 5, 0.05, 0.8, 1.0, False, None, 224),
    "imagenet22k_to_1k_31b_224": (16 * 32, 4e-4, 0.2, 30, 1, 1e-8, 0, 0, True, 0.7, 224),
    "imagenet22k_to_1k_31b_384": (32 * 16, 4e-4, 0.3, 30, 1, 1e-8, 0, 0, True, 0.7, 384),
    "imagenet22k_to_1k_31l_384": (32 * 16, 4e-4, 0.3, 30, 1, 1e-8, 0, 0, True, 0.7, 384),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_papers_recipes_are_the_official_commands(name):
    r = RECIPES[name]()
    o = r.options
    found = (
        r.batch_size, r.lr, r.drop_path, r.epochs, r.warmup_epochs, r.weight_decay, o.mixup, o.cutmix,
        o.ema_decay is not None, o.layer_decay, o.image_size,
    )  # fmt: skip
    assert found == OFFICIAL[name]
    assert o.min_lr == (3e-4 if name in ("imagenet22k_to_1k_31b_384", "imagenet22k_to_1k_31l_384") else 1e-6)
    # the command's defaults
    assert (o.label_smoothing, o.random_erasing, o.auto_augment) == (0.1, 0.25, "rand-m9-mstd0.5-inc1")
    assert o.ema_decay in (None, 0.9999)
    assert r.finetune == (r.lr == 4e-4)
    assert r.evaluate == ("22k_31" not in name)


def test_xl_has_its_own_normalization_and_the_study_its_length():
    xl = RECIPES["imagenet1k_xl_320"]()
    assert (xl.model, xl.options.image_size, xl.normalization) == ("replknet_xl", 320, "inception")
    assert RECIPES["imagenet1k_b_120"]().epochs == 120


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_command_and_names_a_network(name):
    text, recipe = cleandoc(RECIPES[name].__doc__ or ""), RECIPES[name]()
    assert f"`replknet train {name}" in text
    assert timm.is_model(recipe.model)
    assert ("--weights" in text) == recipe.finetune
    if recipe.task != "classification" or recipe.options.dataset == "folder":
        assert "--data" in text
    if "imagenet1k" in name or "to_1k" in name:
        assert "The paper's top-1" in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_a_recipe_divides_its_batch(name):
    text = cleandoc(RECIPES[name].__doc__ or "")
    words = text.split("`replknet train ")[1].split("`")[0].split()
    options = {word: int(value) for word, value in pairwise(words) if word in ("--nodes", "--devices")}
    hardware = Hardware(nodes=options.get("--nodes", 1), devices=options.get("--devices", 1))
    assert hardware.accumulated(RECIPES[name]().batch_size) == 1


def test_few_devices_accumulate_the_same_step():
    assert Hardware(devices=8, device_batch=64).accumulated(2048) == 4
    assert Hardware(devices=1, device_batch=64).accumulated(2048) == 32


def test_a_wrong_value_is_named():
    for changes, text in (
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"mixup": -0.1}, "mixup must not be negative, got -0.1"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"warmup_epochs": 5}, "warmup_epochs must be below the 5 epochs, got 5"),
        ({"samples": 100}, "give either epochs or samples, got 5 and 100"),
        ({"epochs": None}, "give either epochs or samples, got None and None"),
        ({"warmup_samples": 7}, "this recipe counts epochs: give warmup_epochs, not warmup_samples"),
    ):
        with pytest.raises(ValueError, match=text):
            cifar10().changed(**changes)


def test_recipes_are_listed(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(RECIPES)
    assert main(["train", "--list", "imagenet1k_31b_224"]) == 0
    assert "The paper's top-1: 83.5 %" in capsys.readouterr().out
    assert main(["train", "--list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"]: one["batch_size"] for one in found} == {n: r().batch_size for n, r in RECIPES.items()}
