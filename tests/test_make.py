"""The targets of the Makefile, without running what takes long."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# a package can be tested where it was installed without make
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*words, folder=ROOT):
    # as from a shell, though `make test` may run this
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_help_explains_every_target():
    text = make("help").stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in text.splitlines()] == targets
    assert all(len(line.split()) > 3 for line in text.splitlines())


def test_the_second_time_nothing_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    assert "pip install" in make("-n", "demo", folder=tmp_path).stdout
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "installed-demo", "installed-test"):
        (tmp_path / ".venv" / name).touch()
    for target, command in (("demo", "replknet demo"), ("test", "pytest")):
        commands = make("-n", target, folder=tmp_path).stdout
        assert "pip install" not in commands
        assert command in commands
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.cpp").touch()
    assert "pip install" in make("-n", "test", folder=tmp_path).stdout


def test_ci_runs_the_full_matrix_and_the_sanitizers():
    ci = (ROOT / ".ci" / "run").read_text()
    targets = re.findall(r"^(?:exec )?make (\S+)$", ci, re.MULTILINE)
    assert targets == ["test-all", "sanitize"]
    commands = make("-n", "test-all").stdout
    # the campaigns are tests of the full matrix
    for command in ("ruff check", "mypy", "pytest -q --full --hypothesis-profile=repeatable"):
        assert command in commands
    # what is not full runs in both
    for target in ("test", "test-all"):
        assert "-n2 --dist loadfile" in make("-n", target).stdout
    assert "--full" not in make("-n", "test").stdout


def test_a_missing_native_kernel_stops_the_installation(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # installs nothing, and finds no library
    hide = (
        "import replknet.kernels.native_core as core; core.library_path = lambda: None; exec(__import__('sys').argv[1])"
    )
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 0\nexec {sys.executable} -c "{hide}" "$2"\n')
    python.chmod(0o755)
    result = make(".venv/installed-demo", folder=tmp_path)
    assert result.returncode == 2
    assert "the native kernel was not built: `.venv/bin/python -m pip install -v .` shows why" in result.stderr
    assert not (tmp_path / ".venv" / "installed-demo").exists()
    assert make(".venv/installed-demo", "NATIVE=0", folder=tmp_path).returncode == 0


def test_gpu_says_what_the_python_lacks(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    result = make("gpu", f"PYTHON={python}")
    assert result.returncode == 2
    assert f"no CUDA device was looked for: {python} has no torch, timm, numpy or pytest" in result.stderr
