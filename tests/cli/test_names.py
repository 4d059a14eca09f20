"""What people type: commands by group, older names, nearest values, help that fits, completions and colour."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from matrix import matrix
from replknet.cli import colour, completion
from replknet.cli.main import COMMANDS, GROUPS, OLD, main
from replknet.cli.train import _RARE
from replknet.tasks import RECIPES
from replknet.train.hardware import Hardware


def refused(words, capsys):
    """The error of a call that the parser refuses."""
    assert main(words) == 2
    return capsys.readouterr().err


def test_the_overview_has_every_command_in_its_group(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert list(GROUPS) == ["learn", "train", "deploy", "analyse", "machine"]
    assert re.findall(r"^(\w+)$", told, re.MULTILINE) == list(GROUPS)
    assert re.findall(r"^  (\w+) +", told, re.MULTILINE) == list(COMMANDS)


def test_version_and_overview_load_no_torch():
    for word in ("--version", "--help"):
        code = f"import sys; from replknet.cli.main import main; main(['{word}']); "
        code += "print(len(sys.modules), 'torch' in sys.modules, 'jsonargparse' in sys.modules)"
        last = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1]
        modules, torch, jsonargparse = last.split()
        # 2,728 once, with torch
        assert (torch, jsonargparse) == ("False", "False"), word
        assert int(modules) < 300, word


def test_help_of_a_training_loads_no_lightning():
    code = "import sys; from replknet.cli.main import main\ntry: main(['train', 'camvid', '--help'])\n"
    code += "except SystemExit: print([n for n in ('pytorch_lightning', 'transformers', 'monai') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"


OLDER = (
    (["recipes", "camvid"], "replknet train --list"),
    (["plan", "cifar10", "--model", "replknet_test", "--json"], "replknet train --plan"),
    (["kernels", "replknet_cifar_l", "-o", "OUT", "--json"], "replknet analyze kernels"),
)


@pytest.mark.parametrize(("words", "now"), matrix(OLDER, OLDER[:1]))
def test_an_older_name_runs_and_says_what_it_is_now(words, now, capsys, tmp_path):
    words = [str(tmp_path / "k.png") if word == "OUT" else word for word in words]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == f"replknet {words[0]}: this is now `{now}`; version 1.0 removes the old name\n"
    assert out


def test_every_older_name_leads_to_a_command():
    for before, _ in OLD.values():
        assert before[0] in COMMANDS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "x", "--to", "onx"], "--to takes one of onnx, openvino, pt2, aoti, got onx; did you mean onnx?"),
        (["bench", "modell"], "subject takes one of ops, model, got modell; did you mean model?"),
        (["train", "camvid", "--dataset", "ade20"], "--dataset takes one of ade20k, cityscapes, masks, got ade20"),
        (["train", "camvid", "--crop", "3"], "--crop takes a list such as '[7, 7]', got 3"),
        (["train", "camvid", "--window", "x"], "--window takes a whole number or null, got x"),
        (["predict", "x", "y", "--top", "few"], "--top takes a whole number, got few"),
        (["train", "cifar10", "--epoch", "3"], "did you mean --epochs?"),
    ],
)
def test_a_wrong_value_gets_what_was_expected(words, message, capsys):
    assert message in refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "cifar10", "--model", "replknet_31"],
            "no network is called 'replknet_31'; did you mean",
        ),
        (["analyze", "kernel"], "no part is called 'kernel'; did you mean kernels?"),
        (["train", "shapes", "--plan"], "there is no estimate for a detector"),
        (["train"], "name a recipe; replknet train --list shows them"),
        (["export", "replknet_cifar_l", "--to", "onnx", "--loss", "3"], "without --int8: leave out --loss"),
        (["export", "replknet_cifar_l", "--to", "pt2", "--int8"], "int8 is written for onnx, openvino, got --to pt2"),
        (["predict", "replknet_cifar_l", "x", "--min-score", "0.5"], "is a classifier: leave out --min-score"),
        (["--completion", "fish"], "--completion takes a shell: bash, zsh, tcsh"),
    ],
)
def test_a_wrong_call_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["cifar10", "camvid", "coco_cascade_xl"])
def test_help_of_a_recipe_shows_its_defaults_and_what_people_use(name, capsys):
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    told = capsys.readouterr().out
    recipe = RECIPES[name]()
    # argparse breaks lines anywhere
    flat = " ".join(told.split())
    told_of_model = "timm's name of the network; for segmentation and detection the name of the backbone"
    assert f"--model NAME {told_of_model} (default: {recipe.model})" in flat
    assert f"(default: {recipe.batch_size})" in flat
    options = re.findall(r"^  --([\w-]+)", told, re.MULTILINE)
    assert 25 <= len(options) <= 42
    assert "sync-bn" not in options
    # no types of Python, and no list of all recipes
    assert "class '" not in told
    assert "imagenet22k" not in told
    with pytest.raises(SystemExit):
        main(["train", name, "--help-all"])
    everything = re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(options) < set(everything)
    assert "sync-bn" in everything
    # the length is counted in one unit
    assert ("epochs" in everything) != ("samples" in everything)


def test_what_is_hidden_in_the_help_of_a_training_is_a_field_of_a_recipe():
    records = [Hardware(), *(RECIPES[name]() for name in ("cifar10", "camvid", "bccd"))]
    records += [recipe.options for recipe in records[1:]]
    known = {field.name for record in records for field in dataclasses.fields(record)}
    assert set(_RARE) <= known


def test_a_file_for_another_runtime_is_refused_where_layers_are_needed(tmp_path, capsys):
    file = str(tmp_path / "net.onnx")
    Path(file).touch()
    commands = [
        ["merge", file, str(tmp_path / "m.safetensors")],
        ["export", file, "--to", "onnx"],
        ["analyze", "erf", file],
        ["analyze", "kernels", file],
        ["bench", "model", file],
    ]
    for words in commands:
        assert main(words) == 2
        assert f"{file} is a file for another runtime, which has no layers" in capsys.readouterr().err


def test_help_of_every_command_has_no_types_of_python(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        assert "class '" not in told
        assert "Literal" not in told
        assert "==SUPPRESS==" not in told


def test_completions_know_commands_options_and_choices():
    script = completion.script("bash")
    for word in ("predict", "--min-score", "openvino", "--device-batch", "shape-bias"):
        assert word in script
    result = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_there_is_colour_in_a_terminal_alone(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colour.bold("x") == "x"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert colour.bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour.bold("x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert colour.bold("x") == "x"


def test_a_configuration_of_either_unit_is_read_back(tmp_path, capsys):
    for name in ("cifar10", "camvid", "bccd"):
        assert main(["train", name, "--print-config"]) == 0
        text = capsys.readouterr().out
        (tmp_path / "c.json").write_text(text)
        assert main(["train", name, "--config", str(tmp_path / "c.json"), "--print-config"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(text) == RECIPES[name]().plain
