"""What a training keeps: in which order, at which steps, and that states of earlier versions go on."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.classification.train import Classification
from replknet.tasks.training import fit
from replknet.train.checkpoint import KeepState
from replknet.train.curve import KeepCurve
from replknet.train.guard import GuardLoss, LossError
from replknet.train.hardware import Hardware

# an epoch of six steps
RECIPE = cifar10().changed(model="replknet_test", epochs=1, warmup_epochs=0, batch_size=40, workers=0, ema_decay=None)


@pytest.fixture(autouse=True)
def _quiet_and_interruptible(monkeypatch):
    monkeypatch.setenv("CI", "true")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_step(monkeypatch, step, act):
    """Call `act(module, loss)` after the loss of this step, counted from 1, was computed."""
    real = Classification.training_step

    def training_step(self, batch, index):
        loss = real(self, batch, index)
        if self.global_step == step - 1:
            act(self, loss)
        return loss

    monkeypatch.setattr(Classification, "training_step", training_step)


def press(module, loss):
    signal.raise_signal(signal.SIGINT)


def interrupted(monkeypatch, step, folder, cifar, **hardware):
    with monkeypatch.context() as patch:
        at_step(patch, step, press)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, folder, cifar, hardware=Hardware(**hardware))


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def test_files_get_their_names_in_an_order_in_which_the_state_is_last(cifar, tmp_path, monkeypatch):
    names, real = [], os.replace

    def replace(source, target):
        names.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    fit(RECIPE, tmp_path, cifar, hardware=Hardware(save_steps=4))
    kept = [name for name in names if name not in ("recipe.json", "steps.csv", "curve.png")]
    within, after = ["model.safetensors", "last.ckpt"], ["metrics.json", "model.safetensors", "best.safetensors"]
    assert kept == [*within, *after, "last.ckpt"]
    assert not list(tmp_path.glob("*.part"))


def test_a_step_that_is_due_and_interrupted_is_written_once(cifar, tmp_path, monkeypatch):
    steps, real = [], KeepState._write

    def write(self, trainer, *arguments):
        steps.append(trainer.global_step)
        real(self, trainer, *arguments)

    monkeypatch.setattr(KeepState, "_write", write)
    interrupted(monkeypatch, 4, tmp_path, cifar, save_steps=2)
    assert steps == [2, 4]
    assert state(tmp_path)["global_step"] == 4


def test_a_state_is_one_that_earlier_versions_read_and_wrote(cifar, tmp_path, monkeypatch):
    interrupted(monkeypatch, 4, tmp_path, cifar)
    whole = state(tmp_path)
    # when one callback did all of it, this was its name
    assert list(whole["callbacks"]) == ["KeepLast"]
    kept = whole["callbacks"]["KeepLast"]
    assert kept.keys() == {"curve", "seconds", "losses"}
    assert kept["curve"] == []
    assert kept["seconds"] > 0
    assert len(kept["losses"]) == 4
    # the row of the epoch has what the state has
    kept["seconds"], kept["losses"] = 1000.0, [50.0] * 4
    torch.save(whole, tmp_path / "last.ckpt")
    fit(RECIPE, tmp_path, cifar, resume=True)
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["seconds"] > 1000
    assert 200 / 6 < row["train_loss"] < 250 / 6


def test_the_earliest_states_have_the_curve_alone(cifar, tmp_path, monkeypatch):
    interrupted(monkeypatch, 4, tmp_path, cifar)
    whole = state(tmp_path)
    del whole["callbacks"]["KeepLast"]["seconds"], whole["callbacks"]["KeepLast"]["losses"]
    earlier = {"epoch": -1, "seconds": 1.0, "train_loss": 2.0, "val_top1": 2.0}
    whole["callbacks"]["KeepLast"]["curve"] = [earlier]
    torch.save(whole, tmp_path / "last.ckpt")
    fit(RECIPE, tmp_path, cifar, resume=True)
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert rows[0] == earlier
    assert rows[1]["epoch"] == 0
    # the epoch before was better
    assert not (tmp_path / "best.safetensors").exists()


def test_only_more_of_the_score_is_better():
    curve = KeepCurve(Path())
    for rows, best in (
        ([{"val_top1": 0.0}], True),
        ([{"val_top1": 0.5}, {"val_top1": 0.5}], False),
        ([{"val_top1": 0.5}, {}, {"val_top1": 0.6}], True),
        ([{"val_top1": 0.5}, {}], False),
        ([{}], False),
    ):
        curve.load_state_dict({"curve": rows})
        assert curve.last_is_best("val_top1") == best, rows


def test_a_bad_loss_in_the_last_step_is_neither_in_the_curve_nor_in_a_state(cifar, tmp_path, monkeypatch):
    def spoil(module, loss):
        module.last_loss = loss.detach() * float("inf")

    at_step(monkeypatch, 6, spoil)
    with pytest.raises(LossError, match=r"the loss of step 6 is inf; its batch is in .*bad_batch.safetensors"):
        fit(RECIPE, tmp_path, cifar)
    assert (tmp_path / "bad_batch.safetensors").exists()
    assert not list(tmp_path.glob("metrics.json*"))
    assert not list(tmp_path.glob("*.ckpt*"))


def test_a_bad_batch_of_boxes_is_named_by_its_parts(tmp_path):
    guard, trainer = GuardLoss(tmp_path), SimpleNamespace(global_step=3, global_rank=2)
    batch = (torch.zeros(2, 3), [{"boxes": torch.ones(1, 4)}, {"boxes": torch.ones(2, 4)}])
    guard.on_train_batch_end(trainer, SimpleNamespace(last_loss=torch.tensor(torch.nan)), None, batch, 0)
    with pytest.raises(LossError, match="step 3 is nan"):
        guard.on_train_batch_start(trainer, None, None, 1)
    # each process has a file of its own
    assert {name: list(t.shape) for name, t in load_file(tmp_path / "bad_batch_2.safetensors").items()} == {
        "images": [2, 3],
        "labels.0.boxes": [1, 4],
        "labels.1.boxes": [2, 4],
    }
