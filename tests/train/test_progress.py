"""What a training tells: rows for programs that a resume does not repeat, lines, events and a picture."""

import csv
import dataclasses

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.classification.train import Classification
from replknet.tasks.training import fit
from replknet.train.hardware import Hardware
from replknet.train.progress import Row

# six steps an epoch
RECIPE = cifar10().changed(model="replknet_test", epochs=3, warmup_epochs=0, batch_size=40, ema_decay=None)


def rows(folder):
    with (folder / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_lines_events_and_a_picture(cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CI", "true")
    fit(RECIPE, tmp_path, cifar, hardware=Hardware(log_steps=4))
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == [4, 8, 12, 16]
    assert [float(row["epoch"]) for row in found] == pytest.approx([4 / 6, 8 / 6, 2, 16 / 6], abs=1e-4)
    for row in found:
        assert 0 <= float(row["waiting"]) < 1
        assert float(row["images_per_second"]) > 0
        assert 0 < float(row["lr"]) <= 1e-2
    assert float(found[0]["seconds_left"]) > float(found[-1]["seconds_left"]) > 0
    told = capsys.readouterr().err
    assert told.count("waiting for images  ") == 4
    assert "step 16  epoch 2.67  loss " in told
    assert told.count("epoch 2 of 3  val_loss ") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 16]
    assert [event.step for event in events.Scalars("val_top1")] == [6, 12, 18]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([float(row["loss"]) for row in found])
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 200
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.full
def test_a_resumed_training_has_each_row_once(cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    real = Classification.training_step

    def step(self, *args):
        if self.global_step == 10:
            raise RuntimeError("power cut")
        return real(self, *args)

    fit(RECIPE, tmp_path / "whole", cifar, hardware=Hardware(log_steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", step)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(RECIPE, tmp_path / "parts", cifar, hardware=Hardware(log_steps=2))
    # the state is that of step 6; the rows are ahead of it, the last one cut short
    assert int(rows(tmp_path / "parts")[-1]["step"]) == 10
    with (tmp_path / "parts" / "steps.csv").open("a") as file:
        file.write("12,2.0")
    fit(RECIPE, tmp_path / "parts", cifar, resume=True, hardware=Hardware(log_steps=2))
    measured = ("images_per_second", "waiting", "seconds_left")
    whole, parts = (
        [{name: value for name, value in row.items() if name not in measured} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert parts == whole


def test_times_are_told_in_a_fitting_unit():
    row = Row(1, 0.5, 1.0, 1e-2, 480.0, 0.02, 0.0)
    told = [str(dataclasses.replace(row, seconds_left=seconds)) for seconds in (75, 3000, 90000)]
    assert [text.split("images  ")[1] for text in told] == ["75 s left", "50 min left", "25.0 h left"]
    assert "480 images/s, 2% waiting" in told[0]
