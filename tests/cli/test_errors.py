"""Errors of commands: one line and an exit code, an object in JSON, and a traceback for bugs alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from matrix import matrix
from replknet import limits
from replknet.cli import errors
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.deploy.verify import AccuracyError
from replknet.kernels.backend import BackendError
from replknet.models import Description, save_model
from replknet.models.replknet import CONFIGS

PHOTO = str(PHOTOS[0])


@pytest.fixture(autouse=True)
def _ci(monkeypatch):
    monkeypatch.setenv("CI", "true")


@pytest.fixture
def network(tmp_path):
    """A classifier whose first class would wipe the screen."""
    description = Description(
        config=CONFIGS["replknet_test"], num_classes=2, image_size=32, classes=("\x1b[2Jwiped", "a cat")
    )
    save_model(description.build(), tmp_path / "net.safetensors", description)
    return str(tmp_path / "net.safetensors")


def error_of(words, capsys, code=2):
    """The line of a call that ends with this code."""
    assert main(words) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["predict", "NET", PHOTO, "-o", "DIR.png"], "--output"),
        (["merge", "NET", "DIR.safetensors"], "OUTPUT"),
        (["export", "NET", "--to", "onnx", "-o", "DIR"], "--output"),
        (["analyze", "erf", "NET", "-o", "DIR"], "--output"),
        (["analyze", "kernels", "NET", "-o", "DIR"], "--output"),
        (["analyze", "shape-bias", "NET", "--cifar10", "-o", "DIR"], "--output"),
        (["bench", "model", "NET", "--output", "DIR"], "--output"),
        (["bench", "ops", "--output", "DIR"], "--output"),
        (["bench", "ops", "--suite", "table1", "--plot", "DIR"], "--plot"),
    ],
)
def test_a_folder_is_no_file_to_write(words, option, network, tmp_path, capsys):
    for name in ("DIR", "DIR.png", "DIR.safetensors"):
        (tmp_path / name).mkdir()
    words = [str(tmp_path / word) if word.startswith("DIR") else word.replace("NET", network) for word in words]
    told = error_of(words, capsys)
    assert f"{option} must name a file, and {tmp_path}/DIR" in told
    assert told.endswith(" is a folder: name a file in it")


@pytest.mark.parametrize("command", [["train", "cifar10"], ["explore", "--list"], ["demo"]])
def test_a_file_is_no_folder_to_write(command, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    told = error_of([*command, "--output", str(file)], capsys)
    assert told.endswith(f": --output must name a folder, and {file} is a file: name another one")
    told = error_of([*command, "--output", str(file / "in")], capsys)
    assert told.endswith(f"would be in {file}, which is a file: name a folder")


def test_a_device_is_not_replaced_by_a_picture(network, capsys):
    told = error_of(["analyze", "kernels", network, "-o", "/dev/null"], capsys)
    assert told.endswith("--output must name a file, and /dev/null is a device: name a file in a folder of yours")
    assert Path("/dev/null").is_char_device()


def test_the_system_s_errors_are_told_without_their_numbers(network, tmp_path, capsys):
    long = tmp_path / f"{'x' * 300}.safetensors"
    assert error_of(["merge", network, str(long)], capsys) == f"replknet merge: {long}: file name too long"
    told = error_of(["train", "cifar10", "--config", str(tmp_path)], capsys)
    assert f"replknet train: {tmp_path} cannot be read as JSON as --print-config writes it: " in told
    assert "Is a directory" in told


def test_a_cache_that_is_no_folder_is_one_line(tmp_path, monkeypatch, capsys):
    for cache in ("/dev/null", str(tmp_path / "file")):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert main(["train", "cifar10", "--output", str(tmp_path / "out")]) == 2
        *_, told = capsys.readouterr().err.splitlines()
        assert told.startswith(f"replknet train: {cache}/replknet")
        assert "cannot be made a folder for downloads: " in told
        assert told.endswith("name another folder (XDG_CACHE_HOME for all data sets)")


def test_json_that_is_nested_too_deeply_is_one_line(tmp_path, capsys):
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    assert "it is nested too deeply; write it anew" in error_of(["train", "cifar10", "--config", str(file)], capsys)
    assert main(["train", "cifar10", "--network", "[" * 100_000]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("replknet train: --network takes an object such as '{\"name\": 1}' or null, got [[[")
    assert len(first) < 300
    assert second == "replknet train --help shows every option"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auto-augment", "zzz"], "auto_augment=zzz cannot be read as an augmentation of timm's"),
        (["--optimizer", "zzz"], "optimizer 'zzz' cannot be read as an optimiser of timm's"),
        (["--network", '{"zzz": 1}'], "replknet_test cannot be built with {'zzz': 1}"),
        (["--network", '{"depths": "abc"}'], "depths"),
        (["--kernels", "[4, 4, 4, 4]"], "kernels must be positive and odd, got [4, 4, 4, 4]"),
        (["--kernels", "[-3, 3, 3, 3]"], "kernels must be positive and odd, got [-3, 3, 3, 3]"),
        (["--image-size", "0"], "image_size must be from 1 to 8192 pixels, got 0"),
        (["--image-size", "20000"], "image_size must be from 1 to 8192 pixels, got 20000"),
        (["--workers", "1000000000"], "workers must be at most 1024, got 1000000000"),
        (["--devices", "60000"], "devices must be at most"),
        (["--devices", "1000000000"], "devices must be at most 65536, got 1000000000"),
        (["--seed", "99999999999"], "seed must be at most 4294967295, got 99999999999"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (["--lr", "1e300"], "lr must be positive, and at most 1e+12, got 1e+300"),
        (["--batch-size", "1" * 40], "batch_size must be positive, and at most 1e+12, got 111"),
        (["--clip-grad", "-1"], "clip_grad must be positive, got -1"),
        (["--layer-decay", "0"], "layer_decay must be above 0 and at most 1, got 0.0"),
    ],
)
def test_options_of_a_recipe_are_checked_before_anything_trains(options, message, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.jpg").symlink_to(PHOTO)
    words = ["train", "folder", "--model", "replknet_test", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert message in error_of([*words, *options], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "NET", PHOTO, "--top", "0"], "top must be positive, got 0"),
        (["eval", "NET", "--batch-size", "-3"], "batch_size must be positive, got -3"),
        (["bench", "model", "NET", "--threads", "1000000000"], "--threads must be at most 1,024, got 1,000,000,000"),
        (["bench", "ops", "--threads", "1000000000"], "--threads must be at most 1,024, got 1,000,000,000"),
        (["bench", "model", "NET", "--size", "99999"], "--size must be at most 8,192, got 99,999"),
        (["bench", "model", "NET", "--batch", "99999"], "--batch times both sides must be at most 64,000,000, got"),
        (["analyze", "erf", "NET", "--size", "99999"], "--size must be at most 8,192, got 99,999"),
        (["analyze", "shape-bias", "NET", "--cifar10", "--each", "9999"], "--each must be at most 1,000, got 9,999"),
        (["analyze", "kernels", "NET", "-o", "k.zip"], "the ending of a picture must be one of "),
        (["doctor", "--shape", "1,8,9,9", "--kernel", "1000000000"], "--kernel, its numbers together, must be at most"),
        (["doctor", "--shape", f"1,8,9,{10**19}", "--kernel", "7"], "--shape, its numbers together, must be at most"),
        (["demo", "--epochs", "0"], "epochs must be positive, got 0"),
    ],
)
def test_numbers_that_no_machine_has_are_refused_at_once(words, message, network, capsys):
    assert message in error_of([word.replace("NET", network) for word in words], capsys)


@pytest.mark.parametrize("words", [["analyze", "shape-bias", "NET", "--cifar10", "--each", "-1"], ["merge", "NET"]])
def test_errors_of_the_parser_are_json_too(words, network, capsys):
    assert main([*(word.replace("NET", network) for word in words), "--json"]) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert json.loads(out) == {"error": first.partition(": ")[2]}
    assert second.endswith("--help shows every option")


def test_errors_of_a_command_are_json_too(network, tmp_path, capsys, monkeypatch):
    assert main(["predict", str(tmp_path / "none"), PHOTO, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"replknet predict: {json.loads(out)['error']}\n"
    # after the lines of the images before it
    assert main(["predict", network, PHOTO, str(tmp_path / "none.png"), "--json"]) == 2
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(last) == ["error"]
    monkeypatch.setattr("replknet.cli.merge.BOUND", -1.0)
    assert main(["merge", network, str(tmp_path / "m.safetensors"), "--verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["error"].startswith("the outputs differ by ")


def test_the_list_of_suites_is_json_too(capsys):
    assert main(["bench", "ops", "--list", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["suite"] == "layers"
    assert "31b.stage1" in found[0]["cases"]


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (BackendError("no backend takes this call"), 2, "no backend takes this call"),
        (AccuracyError("may differ by 1e-05, got 1"), 1, "may differ by 1e-05, got 1"),
        (PermissionError(13, "Permission denied", "a\nb"), 2, r"a b: permission denied"),
        (OSError(28, "No space left on device"), 2, "no space left on device"),
        (ValueError("a\x1b[2Jb\udcff\nc"), 2, r"a\x1b[2Jb\xff c"),
        (MemoryError(), 2, "there is not enough memory"),
        (
            ValueError("Caught ImageError.\nOriginal Traceback (most recent call last):\n  x\nE: a.jpg is cut"),
            2,
            "a.jpg is cut",
        ),
    ],
)
def test_an_error_is_one_clean_line(raised, code, told, capsys, monkeypatch):
    def failing(argv):
        raise raised

    monkeypatch.setattr("replknet.cli.doctor.main", failing)
    assert error_of(["doctor"], capsys, code) == f"replknet doctor: {told}"


@pytest.mark.parametrize("raised", [RuntimeError("torch's own"), RecursionError(), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(raised, monkeypatch):
    def failing(argv):
        raise raised

    monkeypatch.setattr("replknet.cli.doctor.main", failing)
    with pytest.raises(type(raised)):
        main(["doctor"])


def test_a_variable_shows_where_an_error_comes_from(monkeypatch, capsys):
    assert main(["--help"]) == 0
    assert "REPLKNET_DEBUG=1" in capsys.readouterr().out
    monkeypatch.setenv("REPLKNET_DEBUG", "1")
    assert main(["predict", "none", PHOTO]) == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "load_network" in told
    assert told.splitlines()[-1].startswith("replknet predict: no checkpoint at none")


def test_a_long_error_keeps_its_start_and_its_end():
    line = errors.line_of(ValueError(f"start {'x' * 5000} the way out"))
    assert len(line) < 1_000
    assert line.startswith("start x")
    assert line.endswith("x the way out")


STREAMS = (
    (["info"], "> /dev/full", 2, "replknet: the output cannot be written: no space left on device\n"),
    (["--help"], "> /dev/full", 2, "replknet: the output cannot be written: no space left on device\n"),
    (["info", "--json"], ">&-", 0, ""),
    (["predict", "none", PHOTO], "2>&- >&-", 2, ""),
)


@pytest.mark.parametrize(("words", "redirected", "code", "told"), matrix(STREAMS, STREAMS[1:2]))
def test_streams_that_are_full_or_closed_end_without_a_second_error(words, redirected, code, told):
    command = f'exec "$0" -m replknet.cli.main {" ".join(words)} {redirected}'
    without = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        ["bash", "-c", command, sys.executable], capture_output=True, text=True, check=False, env=without
    )
    assert (result.returncode, result.stderr) == (code, told)


def test_names_that_are_no_utf8_work_and_texts_of_files_are_clean(network, tmp_path, capsysbinary):
    photo = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    os.symlink(PHOTO, photo)
    picture = os.fsdecode(os.fsencode(tmp_path) + b"/k\xe9.png")
    assert main(["predict", network, photo]) == 0
    out = capsysbinary.readouterr().out
    assert rb"caf\xe9.jpg: " in out
    assert rb"\x1b[2Jwiped" in out
    assert main(["predict", network, photo, "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["image"] == photo
    assert main(["analyze", "kernels", network, "-o", picture]) == 0
    assert rb"k\xe9.png" in capsysbinary.readouterr().out
    assert Path(picture).exists()


def test_limits_are_for_one_call_and_for_the_processes_it_starts(monkeypatch, capsys):
    seen = []

    def run(path, task=None, trust=False):
        seen.append(limits.factor())
        raise ValueError("enough")

    monkeypatch.setattr("replknet.cli.predict.load_network", run)
    assert main(["predict", "x", "y", "--limits", "4"]) == 2
    assert seen == [4.0]
    assert limits.VARIABLE not in os.environ
    capsys.readouterr()
    for wrong in ("0", "-1", "nan", "many"):
        assert main(["predict", "x", "y", f"--limits={wrong}"]) == 2
        assert f"--limits takes a positive number, such as 4, got {wrong}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "model", "x", "--limit", "few"], "--limit takes a positive number, got few"),
        (["bench", "model", "x", "--batch", "few"], "--batch takes a positive whole number, got few"),
        (["export", "x"], "the following arguments are required: --to"),
        (["predict", "x", "y", "--top"], "argument --top: expected one argument"),
    ],
)
def test_errors_of_the_parser_name_what_came_and_the_option(words, message, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith(f": {message}")


def test_dollars_in_names_are_no_formulas(network, tmp_path, capsys):
    file = tmp_path / r"$\frac$.safetensors"
    Path(network).rename(file)
    assert main(["analyze", "kernels", str(file), "-o", str(tmp_path / "k.png")]) == 0
