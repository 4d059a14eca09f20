"""A training that Ctrl-C ends, at any moment, and that goes on to the end as if it had not."""

import copy
import dataclasses
import errno
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from matrix import matrix
from replknet.data.sampling import Drawn, GlobalBatches, collate
from replknet.kernels.malloc import give_back_fragments, keep_freed_memory
from replknet.models import load_model, save_model, timm_model
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.classification.sets import splits
from replknet.tasks.classification.train import Classification
from replknet.tasks.training import fit
from replknet.train.checkpoint import KeepState, StateError
from replknet.train.fit import ResumeError
from replknet.train.guard import LossError
from replknet.train.hardware import Hardware
from replknet.train.interrupts import StopOnInterrupt

# two epochs of six steps on the stand-in for CIFAR-10, with one batch of validation images
RECIPE = cifar10().changed(model="replknet_test", epochs=2, warmup_epochs=0, batch_size=40, workers=0, ema_decay=0.9)


# of the average of the weights, and of the network beside it
SCORES = ("val_loss", "val_top1", "val_loss_raw", "val_top1_raw")


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
    assert all(row.keys() == {"epoch", "seconds", "train_loss", *SCORES} for row in curve)
    assert all(row["seconds"] > 0 for row in curve)
    # the end of the cosine: the schedule was gone through once
    (group, *_) = state(folder)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(RECIPE.options.min_lr, rel=0.5)
    assert load_model(folder / "model.safetensors")


# where Ctrl-C arrives: in which call of a method, and the steps and rows that are kept then
MOMENTS = [
    (Classification, "training_step", 1, 1, 0),
    (Classification, "training_step", 3, 3, 0),
    (ModelEmaV3, "update", 4, 4, 0),
    (Classification, "training_step", 6, 6, 1),
    (Classification, "lr_scheduler_step", 6, 6, 1),
    (Classification, "validation_step", 1, 6, 1),
    (KeepState, "_write", 1, 6, 1),
    (Classification, "training_step", 9, 9, 1),
    (Classification, "validation_step", 2, 12, 2),
]


@pytest.mark.parametrize(
    ("owner", "method", "call", "steps", "rows"),
    matrix(MOMENTS, [MOMENTS[1], MOMENTS[6], MOMENTS[8]]),
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
    recipe = RECIPE.changed(ema_decay=None, epochs=1)
    weights = load_model(fit(recipe, tmp_path, cifar))[0].state_dict()
    trained = state(tmp_path)["state_dict"]
    assert all(torch.equal(value, trained[f"model.{key}"]) for key, value in weights.items())


def test_a_resumed_epoch_goes_on_with_the_images_that_are_left(cifar, tmp_path, monkeypatch):
    seen = []
    real = Classification.training_step

    def step(self, batch, index):
        seen.append(batch[0].sum().item())
        return real(self, batch, index)

    monkeypatch.setattr(Classification, "training_step", step)
    fit(RECIPE, tmp_path / "whole", cifar)
    whole = seen.copy()
    seen.clear()
    with monkeypatch.context() as patch:
        press_in(patch, Classification, "training_step", 2)
        with pytest.raises(KeyboardInterrupt):
            fit(RECIPE, tmp_path / "parts", cifar)
    fit(RECIPE, tmp_path / "parts", cifar, resume=True)
    assert len(set(whole)) == 12
    assert seen == whole
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_training(one, two):
    """Everything but the clock is the same to the bit."""
    states = [state(folder) for folder in (one, two)]
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(states[0][part], states[1][part]), part
    curves = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    for a, b in zip(*curves, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    for name in ("model.safetensors", "best.safetensors"):
        assert same(load_file(one / name), load_file(two / name)), name


def test_before_the_first_step_nothing_is_kept(cifar, tmp_path, monkeypatch):
    press_in(monkeypatch, StopOnInterrupt, "on_train_batch_start", 1)
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


KILLED = """
import os, signal, sys, dataclasses
from pathlib import Path
from replknet.train.hardware import Hardware
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe
from replknet.tasks.classification.train import Classification
from replknet.tasks.training import fit

steps, real = int(sys.argv[4]), Classification.training_step
def step(self, *args):
    if self.global_step == steps:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
Classification.training_step = step
fit(eval(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), hardware=Hardware(save_steps=2))
"""


@pytest.mark.parametrize("steps", matrix([3, 8], [8]))
def test_killed_it_goes_on_to_the_same_weights(steps, cifar, tmp_path):
    # everything random at once; workers may not matter
    recipe = RECIPE.changed(mixup=0.8, cutmix=1.0, drop_path=0.3)
    fit(recipe.changed(workers=1), tmp_path / "whole", cifar)
    arguments = [repr(recipe), tmp_path / "parts", cifar, str(steps)]
    # sums of another number of threads are other sums
    environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    # the last state that was written within the epoch
    assert state(tmp_path / "parts")["global_step"] == steps // 2 * 2
    fit(recipe, tmp_path / "parts", cifar, resume=True, hardware=Hardware(save_steps=2))
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_an_accumulated_step_is_a_step(cifar, tmp_path, monkeypatch):
    # the norms see fewer images at once, so their statistics are left out
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x * self.weight[:, None, None])
    recipe = RECIPE.changed(epochs=1, label_smoothing=0.0)
    fit(recipe, tmp_path / "one", cifar)
    fit(recipe, tmp_path / "four", cifar, hardware=Hardware(device_batch=10))
    assert_close_trainings(tmp_path / "one", tmp_path / "four", steps=6)


def assert_close_trainings(one, two, steps=12):
    """The same to rounding, which AdamW enlarges where a gradient is almost zero."""
    states = [state(folder) for folder in (one, two)]
    assert states[0]["global_step"] == states[1]["global_step"] == steps
    weights = [torch.cat([t.flatten().double() for t in s["state_dict"].values()]) for s in states]
    assert (weights[0] - weights[1]).norm() <= 0.02 * weights[0].norm()
    curves = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    for a, b in zip(*curves, strict=True):
        for name in a.keys() - {"epoch", "seconds"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3), name


def test_a_batch_that_cannot_be_divided_is_an_error(cifar, tmp_path):
    with pytest.raises(ValueError, match="batch_size 40 cannot be divided among 1 processes with 7 images at once"):
        fit(RECIPE, tmp_path, cifar, hardware=Hardware(device_batch=7))
    with pytest.raises(ValueError, match=r"batch_size 40 cannot be divided among 3 processes: .* multiple of 3"):
        fit(RECIPE, tmp_path, cifar, hardware=Hardware(devices=3))
    with pytest.raises(ValueError, match="devices must be positive, got 0"):
        Hardware(devices=0)


def test_an_augmentation_that_the_data_set_lacks_is_an_error(cifar, tmp_path):
    with pytest.raises(ValueError, match="auto_augment is for images in folders; cifar10 has"):
        fit(RECIPE.changed(auto_augment="rand-m9"), tmp_path, cifar)


def test_a_fine_tuning_starts_from_its_checkpoint(cifar, tmp_path, monkeypatch):
    first = fit(RECIPE.changed(epochs=1), tmp_path / "first", cifar)
    recipe = RECIPE.changed(epochs=1, finetune=True)
    with pytest.raises(ValueError, match="name the checkpoint it starts from with --weights FILE"):
        fit(recipe, tmp_path / "second", cifar)
    began = []
    monkeypatch.setattr(
        Classification, "on_fit_start", lambda self: began.append(copy.deepcopy(self.model.state_dict()))
    )
    fit(recipe.changed(weights=str(first)), tmp_path / "second", cifar)
    assert same(dict(began[0]), load_file(first))
    # a classifier of other classes is left out
    other = timm.create_model("replknet_test", num_classes=7)
    save_model(
        other, tmp_path / "seven.safetensors", dataclasses.replace(load_model(first)[1], num_classes=7, classes=())
    )
    fit(recipe.changed(weights=str(tmp_path / "seven.safetensors")), tmp_path / "third", cifar)
    assert began[1]["head.weight"].shape[0] == 10
    assert torch.equal(began[1]["stem.0.conv.weight"], other.state_dict()["stem.0.conv.weight"])
    with pytest.raises(ValueError, match="does not fit RepLKNet"):
        fit(recipe.changed(weights=str(first), model="replknet_cifar"), tmp_path / "fourth", cifar)


def test_without_evaluation_there_are_no_scores(cifar, tmp_path):
    fit(RECIPE.changed(evaluate=False), tmp_path, cifar)
    curve = json.loads((tmp_path / "metrics.json").read_text())
    assert [row.keys() for row in curve] == [{"epoch", "seconds", "train_loss"}] * 2
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()


def test_a_state_of_an_earlier_version_lacks_later_options(cifar, tmp_path):
    fit(RECIPE.changed(epochs=1), tmp_path, cifar)
    whole = state(tmp_path)
    del whole["replknet_recipe"]["precise_bn"]
    torch.save(whole, tmp_path / "last.ckpt")
    fit(RECIPE.changed(epochs=1), tmp_path, cifar, resume=True)
    with pytest.raises(ResumeError, match=r"is of another recipe \(precise_bn was 0, now 2\)"):
        fit(RECIPE.changed(epochs=1, precise_bn=2), tmp_path, cifar, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only glibc keeps gaps so")
def test_gaps_in_memory_are_given_back():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed_memory()
    # 400 MB in blocks of 64 kB, of which every tenth stays
    blocks = [torch.ones(16384) for _ in range(6400)]
    full = resident()
    blocks = blocks[::10]
    give_back_fragments()
    assert len(blocks) == 640
    assert full - resident() > 200e6


def test_sync_bn_on_a_cpu_is_an_error(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sync_bn needs GPUs: torch has no SyncBatchNorm on a CPU"):
        fit(RECIPE.changed(sync_bn=True), tmp_path, cifar)


@pytest.mark.parametrize("option", matrix(["grad_checkpointing", "compile"], ["grad_checkpointing"]))
def test_how_a_step_is_computed_does_not_change_what_is_trained(option, cifar, tmp_path, monkeypatch):
    # without an average, which hides differences, and with drop path, which recomputation must repeat
    recipe = RECIPE.changed(epochs=1, ema_decay=None, drop_path=0.3)
    # Inductor would take a minute; that the operator is right in it is tested with the operator
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, other = tmp_path / "plain", tmp_path / "other"
    fit(recipe, plain, cifar)
    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(timm_model, "checkpoint", lambda *a, **k: calls.append(0) or real(*a, **k))
    fit(recipe, other, cifar, hardware=Hardware(**{option: True}))
    # six steps and one batch of validation, of ten blocks each
    assert len(calls) == (70 if option == "grad_checkpointing" else 0)
    expected, found = load_file(plain / "model.safetensors"), load_file(other / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("evaluate", [True, False])
def test_precise_statistics_are_those_of_the_kept_weights(evaluate, cifar, tmp_path):
    fit(RECIPE.changed(precise_bn=3, evaluate=evaluate), tmp_path, cifar)
    model, _ = load_model(tmp_path / "model.safetensors")
    recipe = RECIPE.changed(precise_bn=3)
    draws = GlobalBatches(240, 40, recipe.seed, start=6)
    drawn = Drawn(splits(recipe, cifar).train, recipe.seed)
    seen = []
    model.stem[0].conv.register_forward_hook(lambda module, x, y: seen.append(y))
    with torch.inference_mode():
        for batch in itertools.islice(draws, 3):
            model(collate(drawn.__getitems__(batch))[0])
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(model.stem[0].bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.stem[0].bn.running_var, var, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_stops_with_its_batch(cifar, tmp_path, monkeypatch):
    real = Classification.training_step

    def step(self, batch, index):
        loss = real(self, batch, index)
        if self.global_step == 8:
            self.last_loss = loss.detach() * float("nan")
            batches.append(batch[0])
        return loss

    batches = []
    monkeypatch.setattr(Classification, "training_step", step)
    with pytest.raises(LossError, match=r"is nan; its batch is in .*bad_batch.safetensors"):
        fit(RECIPE, tmp_path, cifar)
    assert torch.equal(load_file(tmp_path / "bad_batch.safetensors")["images"], batches[0])
    assert state(tmp_path)["global_step"] == 6


def test_a_full_disk_leaves_the_state_before(cifar, tmp_path, monkeypatch):
    real = pl.Trainer.save_checkpoint

    def save(self, path, *args):
        if self.global_step > 6:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", save)
        with pytest.raises(StateError, match=r"step 12 could not be written .*No space left on device"):
            fit(RECIPE, tmp_path, cifar)
    assert not (tmp_path / "last.ckpt.part").exists()
    assert state(tmp_path)["global_step"] == 6
    fit(RECIPE, tmp_path, cifar, resume=True)
    check_complete(tmp_path)


def test_a_damaged_state_is_no_state(cifar, tmp_path):
    fit(RECIPE.changed(epochs=1), tmp_path, cifar)
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="cannot be read as the state of a training: File is not a zip"):
        fit(RECIPE, tmp_path, cifar, resume=True)
    middle = len(whole) // 2
    last.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(StateError, match="is damaged: the checksum of"):
        fit(RECIPE, tmp_path, cifar, resume=True)


DISTRIBUTED = """
import os, sys
from pathlib import Path
import torch
from replknet.train.hardware import Hardware
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe
from replknet.tasks.classification.train import Classification
from replknet.tasks.training import fit

real = Classification.training_step
def step(self, *args):
    if sys.argv[4] == "half" and self.global_step == 9:
        os._exit(0)
    return real(self, *args)
Classification.training_step = step
torch.nn.BatchNorm2d.forward = lambda self, x: x * self.weight[:, None, None] + self.bias[:, None, None]
fit(eval(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), resume=sys.argv[4] == "resume",
    hardware=Hardware(devices=int(sys.argv[5]), device_batch=10, shard=sys.argv[6] == "shard"))
"""


def _before(folder):
    """PYTHONPATH with a folder more; a source tree that is not the installed one may be named there."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def under_slurm(processes, arguments, environment):
    """Start the processes as srun does, with what it tells them."""
    common = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(processes), "SLURM_NODEID": "0"}
    common |= {"SLURM_NTASKS_PER_NODE": str(processes), "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            env={**environment, **common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors


def distributed(processes, recipe, folder, cifar, how="new", shard="whole", slurm=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    script = folder.parent / "distributed_run.py"
    script.write_text(DISTRIBUTED)
    arguments = ["distributed_run", repr(recipe), folder, cifar, how, str(processes), shard]
    environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": _before(folder.parent)}
    if slurm:
        return under_slurm(processes, arguments, environment)
    result = subprocess.run([*command, *arguments], check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.full
def test_two_processes_train_what_one_does(cifar, tmp_path):
    # norms without statistics, as each process has its own; 2 x 10 images twice, or 10 images four times
    recipe = RECIPE.changed(label_smoothing=0.0)
    for processes in (1, 2):
        distributed(processes, recipe, tmp_path / str(processes), cifar)
    assert_close_trainings(tmp_path / "1", tmp_path / "2")
    distributed(2, recipe, tmp_path / "srun", cifar, slurm=True)
    assert torch.equal(*(state(tmp_path / name)["state_dict"]["model.head.weight"] for name in ("2", "srun")))
    # what two have begun one can end, from the state of the first epoch
    for processes, how in ((2, "half"), (1, "resume")):
        distributed(processes, recipe, tmp_path / "other", cifar, how)
    assert_close_trainings(tmp_path / "1", tmp_path / "other")


@pytest.mark.full
def test_divided_weights_train_what_whole_ones_do(cifar, tmp_path):
    recipe = RECIPE.changed(label_smoothing=0.0, ema_decay=None, layer_decay=0.8)
    distributed(1, recipe, tmp_path / "1", cifar)
    distributed(2, recipe, tmp_path / "2", cifar, shard="shard")
    assert_close_trainings(tmp_path / "1", tmp_path / "2")
    for how in ("half", "resume"):
        distributed(2, recipe, tmp_path / "other", cifar, how, shard="shard")
    assert_close_trainings(tmp_path / "1", tmp_path / "other")


def test_what_cannot_be_divided_is_an_error(cifar, tmp_path):
    with pytest.raises(ValueError, match="shard divides the weights among processes, and there is one"):
        fit(RECIPE, tmp_path, cifar, hardware=Hardware(devices=1, shard=True))
    with pytest.raises(ValueError, match=r"shard cannot keep an average of the weights \(ema_decay\): timm's average"):
        fit(RECIPE, tmp_path, cifar, hardware=Hardware(devices=2, shard=True))


@pytest.mark.parametrize("supported", [False, True])
def test_a_processor_without_bfloat16_is_told_of(supported, cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = RECIPE.changed(epochs=1, precision="bf16-mixed", optimizer="nmuon", lr=1e-3)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(recipe, tmp_path, cifar)
    told = [str(warning.message) for warning in found if "no bfloat16" in str(warning.message)]
    assert len(told) == (not supported)
    if told:
        assert "--precision 32-true trains in float32; timm's Muon computes in bfloat16" in told[0]


def test_a_torch_that_says_nothing_of_bfloat16_trains_without_a_warning(cifar, tmp_path, monkeypatch):
    # torch lacks the op where it was built without oneDNN
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fit(dataclasses.replace(RECIPE, epochs=1, precision="bf16-mixed"), tmp_path, cifar).exists()
