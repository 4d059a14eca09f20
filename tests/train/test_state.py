"""States and tables that are damaged: one line says what is wrong and what to do."""

import io
import zipfile
from random import Random

import pytest
import torch
from timm.optim import create_optimizer_v2

from fuzz.targets_trainings import _training, make_state, read_state_of
from replknet.train.files import CURVE, FileError, read_json, rows_of
from replknet.train.optimisers import fallback_of
from replknet.train.progress import read_rows
from replknet.train.state import StateError, _wrong, check_whole


@pytest.fixture
def content():
    """What a real training of two steps wrote."""
    return torch.load(io.BytesIO(_training()[0]), weights_only=True)


def test_a_state_as_it_was_written_is_taken(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(_training()[0])
    read_state_of(tmp_path / "last.ckpt")
    assert content["global_step"] == 2


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["global_step"], "many", "global_step must be of type int, got 'many'"),
        (["global_step"], True, "global_step must be of type int, got True"),
        (["global_step"], -1, "global_step must be a number of steps or epochs, got -1"),
        (["global_step"], 10**40, "got an integer of more than thirty digits"),
        (["replknet_recipe"], [1], "replknet_recipe must have the fields of a recipe"),
        (["replknet_recipe", "lr"], torch.zeros(3), "replknet_recipe must have the fields of a recipe"),
        (["state_dict"], 3, "state_dict must be of type dict, got 3"),
        (["state_dict", "model.head.bias"], torch.zeros(3), "model.head.bias must be a tensor [10], got [3]"),
        (["state_dict", "model.head.bias"], "\x1b[2J", r"must be a tensor [10], got '\x1b[2J'"),
        (["state_dict", "x" * 900], torch.zeros(3), "is in only one of state and network"),
        (["callbacks", "KeepLast"], None, "the curve must be a dict, got None"),
        (["callbacks", "KeepLast", "curve"], [3], "the curve is damaged: expected a row of figures, got 3"),
        (["callbacks", "KeepLast", "curve"], [{}], "the curve is damaged: a row lacks epoch"),
        (["callbacks", "KeepLast", "losses"], ["a"], "the losses of the epoch must be a list of numbers"),
        (["optimizer_states"], [], "optimizer_states must have one state, got a list of 0"),
        (["optimizer_states", 0, "state", 0], 7, "the optimiser's state of a param must be a dict, got 7"),
        (
            ["optimizer_states", 0, "state", 0],
            {},
            "the optimiser's state of a param lacks its number of steps",
        ),
        (["optimizer_states", 0, "state", 0, "step"], [], "'step' of a param must be of type"),
        (["optimizer_states", 0, "param_groups", 0, "lr"], "fast", "lr of a group must be a number, got 'fast'"),
        (["optimizer_states", 0, "param_groups", 0, "fused"], torch.zeros(0), "the settings of a group must be single"),
        (["lr_schedulers", 0, "metric"], torch.zeros(0), "lr_schedulers must have numbers and texts alone"),
        (["pytorch-lightning_version"], "text", "must be a version such as 2.6.6, got 'text'"),
        (["loops", "fit_loop"], {}, "fit_loop lacks state_dict"),
        (
            ["loops", "fit_loop", "epoch_progress", "current", "ready"],
            None,
            "fit_loop.epoch_progress.current.ready must",
        ),
    ],
)
def test_a_state_with_something_else_in_it_says_what(keys, value, message, tmp_path, content):
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(StateError) as error:
        read_state_of(tmp_path / "last.ckpt")
    told = str(error.value)
    assert message in told
    assert told.startswith(f"{tmp_path}/last.ckpt ")
    assert told.endswith("; go on from a copy of the file, or start anew with another --output")
    assert "\n" not in told
    assert len(told) < 1000


@pytest.mark.parametrize("name", ["lamb", "adafactorbv", "nmuon", "sgd", "rmsprop"])
def test_states_of_all_kinds_of_optimisers_are_taken(name, content):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 1))
    optimiser = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.0, momentum=0.9, **fallback_of(model, name))
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimiser.step()
    content["optimizer_states"] = [optimiser.state_dict()]
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    assert _wrong(torch.load(file, weights_only=True)) is None


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(StateError, match=r"archive/data\.pkl is compressed, and torch compresses nothing"):
        check_whole(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"123")
    cipher = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        cipher[cipher.index(signature) + place] |= 1
    path.write_bytes(cipher)
    with pytest.raises(StateError, match=r"cannot be read as the state of a training: File .* is encrypted"):
        check_whole(path)


def test_a_tensor_of_another_size_than_its_bytes_is_found(tmp_path):
    # torch does not look at this when it maps the file
    for seed in (233, 238, 241):
        (tmp_path / str(seed)).mkdir()
        path = make_state(Random(seed), tmp_path / str(seed))
        with pytest.raises(StateError):
            read_state_of(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"step,loss\nmany,1\n", "invalid literal for int"),
        (b"step,loss\n-1,1\n", "a step must not be negative, got -1"),
        (b"loss\n1\n", "KeyError 'step'"),
        (b"step,loss,zzz\n1,2,3\n", "it has a column 'zzz'"),
        (b"step,loss\n1,2,3\n", "it has a column None"),
        (b"step,loss\n\xff,2\n", "'utf-8' codec can't decode"),
    ],
)
def test_a_damaged_table_of_steps_is_one_line(table, message, tmp_path):
    (tmp_path / "steps.csv").write_bytes(table)
    with pytest.raises(StateError) as error:
        read_rows(tmp_path)
    assert message in str(error.value)
    assert str(error.value).endswith("; move it away, and the training goes on with a new one")


def test_a_last_row_that_was_cut_short_is_dropped(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "steps.csv").write_text("step,loss\n1,2.5\n2")
    assert read_rows(tmp_path) == [{"step": "1", "loss": "2.5"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as the curve of a training: Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        ("{}", "is not the curve of a training: expected a list of rows, got a dict of 0"),
        ('[{"epoch": 0, "train_loss": "a"}]', "'train_loss' must be a number, got 'a'"),
        ('[{"epoch": 0}]', "a row lacks train_loss"),
    ],
)
def test_a_damaged_curve_is_one_line(text, message, tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    file.write_text(text)
    with pytest.raises(FileError) as error:
        rows_of(file, CURVE)
    assert message in str(error.value)
    monkeypatch.setattr("replknet.limits.LIST", 0.1)
    with pytest.raises(FileError, match=r"metrics\.json asks for .* bytes of JSON, more than the 0 allowed"):
        read_json(file, CURVE)
