"""Damaged files of trainings and of experiments: `last.ckpt`, `steps.csv`, `run.json`."""

import io
import logging
import os
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from fuzz.frame import Target
from fuzz.mutators import extreme, mutated, mutated_text, mutated_zip, zip_members
from replknet.explore.experiment import Arm, RecordError, Site
from replknet.explore.program import read
from replknet.tasks import TASKS
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.training import fit
from replknet.train.fit import ResumeError, _state
from replknet.train.hardware import Hardware
from replknet.train.progress import read_rows
from replknet.train.state import StateError, check_fits

_RECIPE = cifar10().changed(model="replknet_test", epochs=1, warmup_epochs=0, batch_size=20, workers=0, ema_decay=None)


@cache
def _training() -> tuple[bytes, bytes, pl.LightningModule]:
    """A state and a table of steps that a real training of two steps wrote, and its module."""
    with TemporaryDirectory() as name, mock.patch.dict(os.environ, {"CI": "true"}):
        folder = Path(name)
        arrays = {}
        for split, images in (("train", 40), ("test", 10)):
            arrays[f"{split}_images"] = torch.zeros(images, 3, 32, 32, dtype=torch.uint8)
            arrays[f"{split}_labels"] = torch.arange(images) % 10
        save_file(arrays, folder / "cifar10.safetensors")
        fit(_RECIPE, folder / "run", folder, hardware=Hardware(log_steps=1))
        module = TASKS["classification"].train.job(_RECIPE, folder, Hardware()).module
        content = torch.load(folder / "run/last.ckpt", weights_only=True)
        table = (folder / "run/steps.csv").read_text().splitlines()
    # times differ from process to process
    content["callbacks"]["KeepLast"]["curve"][0]["seconds"] = 1.5
    steps = "\n".join([table[0], "1,0.5,2.3,0.005,200.0,0.04,1.5", "2,1.0,2.2,0.001,400.0,0.08,0.0", ""])
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue(), steps.encode(), module


@cache
def _trainer() -> pl.Trainer:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def make_state(random: Random, folder: Path) -> Path:
    """A changed state: other values in it, other members of the archive, or other bytes."""
    data, _, _ = _training()
    path = folder / "last.ckpt"
    what = random.random()
    if what < 0.6:
        content = torch.load(io.BytesIO(data), weights_only=True)
        for _ in range(random.choice((1, 1, 2, 4))):
            _change(random, content)
        torch.save(content, path)
    elif what < 0.8:
        path.write_bytes(mutated_zip(random, zip_members(data)))
    else:
        path.write_bytes(mutated(random, data))
    return path


def _change(random: Random, content: Any) -> None:
    """Replace, remove or rename one value, at any depth."""
    value = content
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        if not keys:
            return
        key = random.choice(keys)
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.15:
            break
        value = inner
    what = random.random()
    if what < 0.6 or not isinstance(value, dict):
        new = (torch.zeros(3), torch.zeros(0), torch.zeros(2, dtype=torch.int64), 1.5, -1, True, None, "text", [], {})
        value[key] = extreme(random) if random.random() < 0.5 else random.choice(new)
    elif what < 0.85:
        del value[key]
    else:
        value[random.choice(("", "x" * 1000, "\x1b[2J", 7))] = value.pop(key)


def read_state_of(path: Path) -> None:
    """What `replknet train --resume` does with a state before it trains."""
    _, _, module = _training()
    state = _state(path, _RECIPE, resume=True)
    assert state is not None
    check_fits(state, _trainer(), module)


def make_steps(random: Random, folder: Path) -> Path:
    """A changed table of steps."""
    _, table, _ = _training()
    path = folder / "steps.csv"
    path.write_bytes(mutated(random, table * random.choice((1, 1, 50))))
    return path


def _arm() -> Arm:
    return Arm(name="an arm", configuration={"a": 1}, run=lambda *_: {}, seconds=lambda site: 1.0)


def make_run(random: Random, folder: Path) -> Path:
    """A changed record of a run."""
    arm = _arm()
    content = {"arm": arm.name, "key": arm.key, "seed": 0, "figures": {"score": 0.5, "parameters": 9, "map": ["1 2"]}}
    content |= {"seconds": 1.5, "provenance": {"device": "cpu", "threads": 2}}
    path = Site(output=folder).folder(arm, 0) / "run.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(mutated_text(random, content))
    return path


TARGETS = (
    Target(
        name="last_ckpt",
        question="does a training refuse a damaged state with one line",
        make=make_state,
        read=read_state_of,
        allowed=(StateError, ResumeError),
    ),
    Target(
        name="steps_csv",
        question="does a training refuse a damaged table of its steps with one line",
        make=make_steps,
        read=lambda path: read_rows(path.parent),
        allowed=(StateError,),
    ),
    Target(
        name="run_record",
        question="does `replknet explore` refuse a damaged record of a run with one line",
        make=make_run,
        read=lambda path: read(Site(output=path.parents[2]), _arm(), 0),
        allowed=(RecordError,),
    ),
)
