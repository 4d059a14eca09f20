"""A plan against what a real step on a CPU allocates, and against arithmetic."""

import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from matrix import matrix
from replknet.cli.main import main
from replknet.data.masks import Classes
from replknet.tasks import RECIPES, TASKS
from replknet.tasks.classification.recipes import cifar10, cifar10_l
from replknet.tasks.segmentation.recipes import camvid
from replknet.tasks.segmentation.train import create_network, description_of, training_loss
from replknet.train import estimate as estimates
from replknet.train.hardware import Hardware
from replknet.train.optimisers import fallback_of


def estimate(recipe, *others, **more):
    return estimates.estimate(recipe, TASKS[recipe.task].train, *others, **more)


def step_memory(recipe, *others):
    return estimates.step_memory(recipe, TASKS[recipe.task].train, *others)


def allocated(recipe, images, hardware):
    """Bytes at the worst moment of a real step, from torch's profiler."""
    model = timm.create_model(recipe.model, num_classes=10).to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(hardware.grad_checkpointing)
    side = recipe.options.image_size
    x = torch.randn(images, 3, side, side).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(images, dtype=torch.long)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16-mixed"):
            return torch.nn.functional.cross_entropy(model(x), target)

    return worst(model, recipe.optimizer, [x], loss)


def worst(model, name, inputs, loss):
    optimizer = create_optimizer_v2(model, name, lr=1e-3, **fallback_of(model, name))

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers(), *inputs]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    live, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize(
    ("name", "side", "images", "precision", "checkpointing"),
    matrix(
        [
            ("replknet_nano", 96, 8, "32-true", False),
            ("replknet_nano", 96, 8, "bf16-mixed", False),
            ("replknet_nano", 96, 8, "32-true", True),
            ("replknet_cifar_l", 32, 32, "bf16-mixed", False),
        ],
        [("replknet_nano", 96, 8, "32-true", True)],
    ),
)
def test_a_plan_is_what_a_real_step_allocates(name, side, images, precision, checkpointing):
    recipe = cifar10_l().changed(model=name, image_size=side, batch_size=images, precision=precision, ema_decay=None)
    hardware = Hardware(devices=1, grad_checkpointing=checkpointing)
    planned = step_memory(recipe, hardware, images, 10).total
    assert planned == pytest.approx(allocated(recipe, images, hardware), rel=0.15)


@pytest.mark.full
def test_a_plan_of_a_segmentation_is_what_a_real_step_allocates():
    recipe = camvid().changed(model="replknet_test", network=None, crop=(96, 128), batch_size=4, precision="32-true")
    hardware = Hardware(devices=1)
    planned = step_memory(recipe, hardware, 4, 11)
    some = Classes(tuple("abcdefghijk"), ((0, 0, 0),) * 11)
    model = create_network(recipe, description_of(recipe, some), hardware).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 96, 128).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(4, 96, 128, dtype=torch.uint8)
    real = worst(model, recipe.optimizer, [x, mask], lambda: training_loss(model, x, mask, True))
    assert planned.total == pytest.approx(real, rel=0.15)
    assert planned.average == 0


@pytest.mark.full
def test_parts_are_the_arithmetic_of_the_parameters():
    model = timm.create_model("replknet_test")
    parameters = 4 * sum(p.numel() for p in model.parameters())
    weights = parameters + sum(b.numel() * b.element_size() for b in model.buffers())
    recipe = cifar10().changed(model="replknet_test", batch_size=16)
    alone = step_memory(recipe, Hardware(devices=1), 16, 10)
    assert (alone.weights, alone.optimizer, alone.average, alone.buckets) == (weights, 2 * parameters, weights, 0)
    many = step_memory(recipe.changed(ema_decay=None), Hardware(devices=2), 4, 10)
    # accumulated gradients stay
    assert (many.average, many.buckets, many.gradients) == (0, parameters, parameters)
    sgd = step_memory(recipe.changed(optimizer="sgd"), Hardware(devices=1), 16, 10)
    assert sgd.optimizer == parameters
    muon = step_memory(recipe.changed(optimizer="nmuon"), Hardware(devices=1), 16, 10)
    assert parameters < muon.optimizer < 2 * parameters


@pytest.mark.full
def test_a_plan_takes_the_largest_batch_that_fits():
    recipe = cifar10().changed(model="replknet_test", image_size=64, batch_size=64, epochs=3)
    free = estimate(recipe, Hardware(devices=2), 1000, 10)
    assert (free.device_batch, free.accumulate, free.steps_per_epoch, free.steps, free.fits) == (32, 1, 15, 45, True)
    sizes = free.by_device_batch
    assert list(sizes) == [1, 2, 4, 8, 16, 32]
    tight = estimate(recipe, Hardware(devices=2), 1000, 10, device_memory=1.01 * sizes[8] / 0.9 / 1e9)
    assert (tight.device_batch, tight.accumulate, tight.fits) == (8, 4, True)
    none = estimate(recipe, Hardware(devices=2), 1000, 10, device_memory=1e-6)
    assert (none.device_batch, none.fits) == (1, False)
    with pytest.raises(ValueError, match="batch_size 64 cannot be divided among 3 processes"):
        estimate(recipe, Hardware(devices=3), 1000, 10)
    with pytest.raises(ValueError, match="whole weights are counted on every device"):
        estimate(recipe, Hardware(devices=2, shard=True), 1000, 10)


def test_the_papers_sets_have_their_sizes():
    recipes = {name: recipe() for name, recipe in RECIPES.items()}
    known = {name: TASKS[recipe.task].train.training_set(name, recipe) for name, recipe in recipes.items()}
    assert known["cifar10_l"] == (50_000, 10)
    assert known["folder"] == (None, 1000)
    assert known["camvid"] == known["bccd"] == (None, None)
    assert (known["ade20k_xl_640"], known["cityscapes_31b_769"]) == ((20_210, 150), (2_975, 19))
    assert known["imagenet22k_31l_224"] == (14_197_122, 21_841)
    assert known["imagenet22k_to_1k_31l_384"] == known["imagenet1k_b_120"] == (1_281_167, 1000)


@pytest.mark.full
def test_the_command(capsys):
    assert main(["train", "camvid", "--plan", "--images", "367"]) == 2
    assert "give --classes N" in capsys.readouterr().err
    tiny = ["camvid", "--model", "replknet_test", "--network", "null", "--crop", "[64, 96]", "--images", "367"]
    assert main(["train", *tiny, "--plan", "--classes", "11", "--device-batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epochs"], found["steps"], found["accumulate"]) == (20, 20 * 45, 4)
    assert main(["train", *tiny, "--plan", "--classes", "11", "--device-batch", "1"]) == 2
    assert "a process takes one crop at once" in capsys.readouterr().err
    # with norms over all processes one crop each will do, as the paper's 31L has it
    alone = ["--classes", "11", "--sync-bn", "true", "--gpus", "8", "--json"]
    assert main(["train", *tiny, "--plan", *alone]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device_batch"], found["processes"], list(found["by_device_batch"])) == (1, 8, ["1"])
    short = ["--model", "replknet_test", "--image-size", "64", "--batch-size", "32"]
    assert main(["train", "folder", "--plan", *short]) == 2
    assert "give --images N" in capsys.readouterr().err
    assert (
        main(["train", "folder", "--plan", *short, "--images", "320", "--gpus", "2", "--gpu-memory", "8", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["processes"], found["steps_per_epoch"], found["steps"], found["classes"]) == (2, 10, 300, 1000)
    assert found["total_bytes"] == sum(found["memory"].values())
    assert main(["train", "folder", "--plan", *short, "--images", "320", "--gpu-memory", "0.001", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main(["train", "folder", "--plan", *short, "--images", "320", "--gpu-memory", "0.001"]) == 1
    told = capsys.readouterr().out
    assert "10 steps an epoch, 300 in all" in told
    assert "does not fit 0.001 GB" in told
