"""A training that Ctrl-C ends, at any moment, and that goes on to the end as if it had not."""

import dataclasses
import itertools
import json
import signal

import pytest
import torch
from timm.utils import ModelEmaV3

from replknet.models import load_model
from replknet.recipes import cifar10
from replknet.tasks.classification import Classification
from replknet.train import ResumeError, fit
from replknet.train.callbacks import KeepLast

# two epochs of six steps on the stand-in for CIFAR-10, with one batch of validation images
RECIPE = dataclasses.replace(
    cifar10(), model="replknet_test", epochs=2, warmup_epochs=0, batch_size=40, workers=0, ema_decay=0.9
)


@pytest.fixture(autouse=True)
def _quiet_and_interruptible(monkeypatch):
    monkeypatch.setenv("CI", "true")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_in(monkeypatch, owner, method, call, times=1):
    """Have Ctrl-C arrive inside this call, counted from 1, of a method."""
    real, calls = getattr(owner, method), itertools.count(1)

    def pressed(*args, **kwargs):
        if next(calls) == call:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, method, pressed)


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def counted(monkeypatch):
    """How often the steps of training and of validation run."""
    counts = {"training_step": 0, "validation_step": 0}

    def count(name):
        real = getattr(Classification, name)

        def step(*args):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(Classification, name, step)

    for name in counts:
        count(name)
    return counts


def check_complete(folder):
    assert state(folder)["global_step"] == 12
    curve = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in curve] == [0, 1]
    assert all(row.keys() == {"epoch", "seconds", "train_loss", "val_loss", "val_top1"} for row in curve)
    assert all(row["seconds"] > 0 for row in curve)
    # the end of the cosine: the schedule was gone through once
    assert state(folder)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(RECIPE.min_lr, rel=0.5)
    assert load_model(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("owner", "method", "call", "steps", "rows"),
    [
        (Classification, "training_step", 1, 1, 0),
        (Classification, "training_step", 3, 3, 0),
        (ModelEmaV3, "update", 4, 4, 0),
        (Classification, "training_step", 6, 6, 1),
        (Classification, "lr_scheduler_step", 6, 6, 1),
        (Classification, "validation_step", 1, 6, 1),
        (KeepLast, "_write", 1, 6, 1),
        (Classification, "training_step", 9, 9, 1),
        (Classification, "validation_step", 2, 12, 2),
    ],
    ids=["first step", "step", "average", "last step", "schedule", "validation", "writing", "second epoch", "end"],
)
def test_interrupted_anywhere_it_goes_on_to_the_end(owner, method, call, steps, rows, cifar, tmp_path, monkeypatch):
    counts = counted(monkeypatch)
    with monkeypatch.context() as patch:
        press_in(patch, owner, method, call)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path, cifar)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state(tmp_path)["global_step"] == counts["training_step"] == steps
    assert len(state(tmp_path)["callbacks"]["KeepLast"]["curve"]) == rows
    assert load_model(tmp_path / "model.safetensors")
    assert fit(RECIPE, tmp_path, cifar, resume=True) == tmp_path / "model.safetensors"
    assert counts == {"training_step": 12, "validation_step": 2}
    check_complete(tmp_path)


def test_interrupted_twice_it_still_takes_every_step_once(cifar, tmp_path, monkeypatch):
    counts = counted(monkeypatch)
    for resume, call in ((False, 2), (True, 3)):
        with monkeypatch.context() as patch:
            press_in(patch, Classification, "training_step", call)
            with pytest.raises(KeyboardInterrupt):
                fit(RECIPE, tmp_path, cifar, resume=resume)
    assert state(tmp_path)["global_step"] == 5
    fit(RECIPE, tmp_path, cifar, resume=True)
    assert counts == {"training_step": 12, "validation_step": 2}
    check_complete(tmp_path)


def test_a_second_ctrl_c_stops_at_once_with_the_last_epochs_state(cifar, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        press_in(patch, Classification, "training_step", 9, times=2)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path, cifar)
    assert "Ctrl-C again stops at once and keeps the last epoch's state" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state(tmp_path)["global_step"] == 6
    fit(RECIPE, tmp_path, cifar, resume=True)
    check_complete(tmp_path)


def test_without_an_average_of_the_weights(cifar, tmp_path):
    # official code: AttributeError in each epoch's end where the average was off, as in its own 22K recipe
    recipe = dataclasses.replace(RECIPE, ema_decay=None, epochs=1)
    weights = load_model(fit(recipe, tmp_path, cifar))[0].state_dict()
    trained = state(tmp_path)["state_dict"]
    assert all(torch.equal(value, trained[f"model.{key}"]) for key, value in weights.items())


def test_a_resumed_epoch_gets_other_images_than_it_began_with(cifar, tmp_path, monkeypatch):
    seen = []
    real = Classification.training_step

    def step(self, batch, index):
        seen.append(batch[0].sum().item())
        return real(self, batch, index)

    monkeypatch.setattr(Classification, "training_step", step)
    with monkeypatch.context() as patch:
        press_in(patch, Classification, "training_step", 2)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path, cifar)
    fit(RECIPE, tmp_path, cifar, resume=True)
    assert len(set(seen)) == len(seen) == 12


def test_before_the_first_step_nothing_is_kept(cifar, tmp_path, monkeypatch):
    press_in(monkeypatch, KeepLast, "on_train_batch_start", 1)
    with pytest.raises(KeyboardInterrupt):
        fit(RECIPE, tmp_path, cifar)
    assert not (tmp_path / "last.ckpt").exists()
    with pytest.raises(ResumeError, match="nothing to resume: there is no"):
        fit(RECIPE, tmp_path, cifar, resume=True)


def test_where_ctrl_c_is_ignored_it_stays_so(cifar, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    press_in(monkeypatch, Classification, "training_step", 3)
    fit(RECIPE, tmp_path, cifar)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    check_complete(tmp_path)
