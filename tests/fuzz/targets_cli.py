"""Command lines with values that nobody meant, and damaged files of trainings."""

import contextlib
import importlib
import io
import json
import os
import re
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fuzz.frame import Target
from replknet.cli.main import OLD, main
from replknet.cli.options import _expected
from replknet.data.download import DownloadError
from replknet.models import Description, save_model
from replknet.models.replknet import CONFIGS
from replknet.tasks import RECIPES
from replknet.train.estimate import Memory

# what a command may return, see `replknet.cli.main`
CODES = (0, 1, 2, 130, 141)
LETTERS = 1_200

_VALUES = (
    *(
        "",
        " ",
        "missing",
        "folder",
        "notes.txt",
        "empty.txt",
        "x" * 300,
        "folder/" + "y" * 250,
        "a\udcffb",
        "a\x1b[2Jb",
    ),
    *("-1", "0", "1", "2", "3", "8", "1e9", "1000000000", "99999999999999999999", "nan", "inf", "-inf", "1.5", "0.5"),
    *("null", "true", "[", "[" * 3000, '{"a":' * 3000, "[1,2", "{}", '{"a": 1}', "[1e999]", "[3,3,3,3]", "[-1]", "[2]"),
    *("[[1,2]]", "[0,0,0,0]", "é", "🦒", "²", "/dev/null", "notes.txt/x", "picture.png", "cipher.zip", "cut.zip", "--"),
    *("deep.json", "list.json", "wrong.json", "config.json", "*", "net.safetensors", "a/b/c.png", "c.safetensors"),
)
_NUMBERS = ("-1", "0", "1", "2", "3", "7", "64", "1000000", "1000000000", "99999999999999999999", "1" * 300)
_FLOATS = (*_NUMBERS, "nan", "inf", "-inf", "0.5", "1.5", "-0.1", "1e-30", "1e300")
_LISTS = (
    "[]",
    "[0]",
    "[3]",
    "[3,3,3,3]",
    "[4,4,4,4]",
    "[-1,-1]",
    "[1,2]",
    "[99999999,9]",
    "[0.5,1e300]",
    "[[1,2]]",
    "null",
)
_OBJECTS = (
    *("{}", '{"a": 1}', '{"kernels": [3]}', '{"depths": [1000000, 1, 1, 1]}', '{"channels": [-1, 0, 1, 2]}', "null"),
    *('{"num_classes": 9}', '{"depths": "abc"}', '{"channels": null}', '{"stem_stride": 0}', '{"small_kernel": 1e9}'),
    *('{"in_chans": -1}', '{"channels": [999999999, 9, 9, 9]}', '{"kernels": {"a": [[]]}}', '{"drop_path_rate": "x"}'),
)
_TEXTS = (
    "rand-m9",
    "rand-",
    "augmix",
    "augmix-m-5",
    "original",
    "3a",
    "rand-m9-q1",
    "adamw",
    "sgd",
    "muon",
    "apexlamb",
    "lookahead_",
)
# modules that take seconds to import, which no single command line is to be blamed for
_SLOW = (
    *("replknet.explore.program", "replknet.explore.demo", "replknet.analysis.plots", "replknet.tasks.training"),
    *("replknet.bench.against", "replknet.tasks.segmentation.train", "replknet.tasks.detection.train", "transformers"),
)
# options that download, run for long, or end in a picture of the help
_WITHOUT = {
    "--runs",
    "--pretrained",
    "--help",
    "-h",
    "--help-all",
    "--cifar10",
    "--memory",
    "--compile",
    "--int8",
    "--parts",
}
_IMAGE = ("picture.png", "folder", "missing", "notes.txt", "a\udcffb.png")
_NETWORK = (
    *("net.safetensors", "net.safetensors", "missing", "folder", "notes.txt", "cipher.zip", "cut.zip"),
    *("replknet_test", "deep.json"),
)
# command -> choices for each of its positional arguments
_POSITIONAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "predict": (_NETWORK, _IMAGE),
    "eval": (_NETWORK,),
    "merge": (_NETWORK, ("m.safetensors", "folder", "folder.safetensors", "notes.txt/m.safetensors", "m.pth", "")),
    "export": (("missing", "folder", "notes.txt", "cut.zip"),),
    "analyze erf": (_NETWORK,),
    "analyze kernels": (_NETWORK,),
    "analyze shape-bias": (_NETWORK,),
    "bench ops": (),
    "bench model": (_NETWORK,),
    "doctor": (),
    "explore": (),
    "demo": (),
    "train": (("folder", "folder", "cifar10", "camvid", "bccd", "shapes", "ade20k_31b_512"),),
}
# words that keep a command from running for long
_SHORT = {
    "bench ops": ("--list",),
    "bench model": ("--runs", "2", "--size", "32", "--against", "merged"),
    "analyze erf": ("--size", "32", "--images", "picture.png"),
    "analyze shape-bias": ("--images", "conflicts"),
    "doctor": ("--shape", "1,8,56,56", "--kernel", "7"),
    "explore": ("--list", "--only", "speed"),
    "eval": ("--data", "folder"),
    "train": ("--data", "folder", "--model", "replknet_test"),
}


def _parser(command: str, recipe: str) -> Any:
    name, _, part = command.partition(" ")
    module = {"bench ops": "bench", "bench model": "bench_model"}.get(command, f"{name}_{part}".rstrip("_"))
    arguments = importlib.import_module(f"replknet.cli.{module.replace('-', '_')}").arguments
    return arguments(RECIPES[recipe]()) if command == "train" else arguments()


@cache
def _options(command: str, recipe: str) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
    """The options of a command: name, and values for it; None for a flag."""
    found: list[tuple[str, tuple[str, ...] | None]] = []
    for action in _parser(command, recipe)._actions:
        if action.option_strings and not _WITHOUT & set(action.option_strings):
            found.append((action.option_strings[-1], None if action.nargs == 0 else _values(action)))
    return tuple(found)


def _values(action: Any) -> tuple[str, ...]:
    """Values that the parser takes, for the most part."""
    form = (
        ""
        if action.type is None and not getattr(action, "_typehint", None) and not action.choices
        else _expected(action)
    )
    if form.startswith("one of"):
        return tuple(form.partition(" or ")[0].removeprefix("one of ").split(", "))
    for start, values in (
        ("a list", _LISTS),
        ("an object", _OBJECTS),
        ("a path", _VALUES),
        ("true", ("true", "false")),
    ):
        if form.startswith(start):
            return values
    if "whole number" in form:
        return _NUMBERS
    return _FLOATS if "number" in form else _VALUES + _TEXTS


def argv_of(random: Random) -> list[str]:
    """A command line."""
    if random.random() < 0.02:
        words = [
            random.choice(_VALUES + tuple(OLD) + ("--completion", "--version")) for _ in range(random.randrange(3))
        ]
        return [*words, "--list"] if words[:1] == ["recipes"] else words
    command = random.choices(list(_POSITIONAL), [6 if name == "train" else 2 for name in _POSITIONAL])[0]
    words, first = command.split(), ""
    for choices in _POSITIONAL[command]:
        first = random.choice(choices if random.random() < 0.9 else _VALUES)
        words.append(first)
    words += _SHORT.get(command, ())
    if command == "train":
        words += random.choice(([], [], ["--plan", "--images", "9", "--classes", "2"], ["--print-config"]))
    options = _options(command, first if first in RECIPES else "folder")
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        name, values = random.choice(options)
        words.append(name)
        if values is not None:
            words.append(random.choice(values if random.random() < 0.8 else _VALUES))
    if random.random() < 0.3:
        words.append("--json")
    return words


@cache
def _files() -> dict[str, bytes]:
    """The files that command lines name: path -> content."""
    for module in _SLOW:
        importlib.import_module(module)
    picture = io.BytesIO()
    Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)).save(picture, "png")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/a/1.png", picture.getvalue())
    cipher = bytearray(archive.getvalue())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        cipher[cipher.index(signature) + place] |= 1
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        description = Description(
            config=CONFIGS["replknet_test"], num_classes=2, image_size=32, classes=("a\x1b[1m", "b")
        )
        save_model(description.build(), f"{folder}/net.safetensors", description)
        network = Path(folder, "net.safetensors").read_bytes()
    return {
        "net.safetensors": network,
        "picture.png": picture.getvalue(),
        "a\udcffb.png": picture.getvalue(),
        "conflicts/cat1-dog2.png": picture.getvalue(),
        **{f"folder/{split}/{name}/1.png": picture.getvalue() for split in ("train", "val") for name in "ab"},
        "folder.safetensors/notes.txt": b"",
        "notes.txt": b"not what was meant\n",
        "empty.txt": b"",
        "cipher.zip": bytes(cipher),
        "cut.zip": archive.getvalue()[:-30],
        "deep.json": b"[" * 100_000,
        "list.json": b"[1, 2]",
        "wrong.json": b'{"epochs": "many", "lr": [1], "model": 3, "network": 7}',
        "config.json": json.dumps({"epochs": 3}).encode(),
    }


def make_command(random: Random, folder: Path) -> Path:
    """A command line, in a folder with the files that it may name."""
    for name, content in _files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / "argv.json"
    path.write_text(json.dumps(argv_of(random)))
    return path


def read_command(path: Path) -> None:
    """Run a command line; all but the training itself."""
    argv = json.loads(path.read_text())
    outcome = run_command(argv, path.parent)
    problem = problem_of(argv, *outcome)
    assert problem is None, f"{argv}: {problem}"


def run_command(argv: list[str], folder: Path) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command in a folder."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    variables = {"CI": "true", "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    threads = torch.get_num_threads()
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch("pytorch_lightning.Trainer.fit"),
        mock.patch("replknet.train.estimate.step_memory", return_value=Memory(1, 1, 1, 1, 1, 1)),
        mock.patch("replknet.data.cifar10.load", side_effect=DownloadError("no network")),
        mock.patch("replknet.explore.demo.load", side_effect=DownloadError("no network")),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code: object = main(argv)
        except SystemExit as ended:
            code = ended.code
        finally:
            torch.set_num_threads(threads)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


def problem_of(argv: list[str], code: object, out: str, err: str) -> str | None:
    """What is wrong with the outcome of a command, or None."""
    if code not in CODES:
        return f"returned {code}"
    lines = [line for line in err.splitlines() if line.startswith("replknet") and "--help shows" not in line]
    lines = [line for line in lines if "version 1.0 removes" not in line]
    if code == 2 and argv and len(lines) != 1:
        return f"an error is one line, got {err!r}"
    if any(len(line) > LETTERS for line in lines):
        return f"a line is longer than {LETTERS} letters: {lines}"
    for text in (out, err):
        found = re.search(r"[^\n\t\x20-\x7e\u00a0-\U0010ffff]", text)
        if found:
            return f"a control character {found[0]!r} in {text!r}"
    if "--json" in argv and code in (1, 2):
        try:
            found_last = json.loads(out.splitlines()[-1])
        except (ValueError, IndexError):
            return f"no JSON in {out!r}"
        if code == 2 and "error" not in found_last:
            return f"no error in {out!r}"
    return None


TARGETS = (
    Target(
        name="command_line",
        question="does every wrong command line end in one line of error",
        make=make_command,
        read=read_command,
        allowed=(),
    ),
)
