"""The package as a whole: its version, and what it leaves alone."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import replknet
from replknet import version
from replknet.cli.main import COMMANDS
from replknet.extras import installing

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_version_is_the_installed_one_and_a_source_tree_has_its_own(monkeypatch):
    assert replknet.__version__ == importlib.metadata.version("replknet")

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", nowhere)
        assert importlib.reload(version).__version__ == "0+source"
    assert importlib.reload(version).__version__ == importlib.metadata.version("replknet")


def test_importing_changes_no_search_path_and_prints_nothing():
    # official code: sys.path was changed to find the operator, and the model printed as it was built
    code = "import sys; before = list(sys.path); import replknet; assert sys.path == before"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_name_that_its_package_has_given_up_is_used():
    # official code: it stopped running when these went
    gone = r"timm\.models\.layers|timm\.optim\.optim_factory|torch\.cuda\.amp|torch\.distributed\.launch|seaborn"
    assert [path.name for path in SOURCES if re.search(gone, path.read_text())] == []


def test_install_hints_start_from_a_clone_and_name_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *SOURCES]
    text = "\n".join(path.read_text() for path in pages)
    # no index has the name replknet yet
    assert re.findall(r"pip install ['\"]?replknet\b.*|.*replknet\[[a-z]+[],].*", text) == []
    named = re.findall(r"pip install ['\"]\.\[([\w,]+)\]", text) + re.findall(r"installing\(['\"](\w+)", text)
    assert len(named) > 5
    assert {extra for names in named for extra in names.split(",")} - set(extras) == set()
    assert installing("seg,viz") == '`pip install ".[seg,viz]"` in a clone of replknet'
    assert installing() == "`pip install .` in a clone of replknet"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(page):
    places = [ROOT, ROOT / "src" / "replknet", ROOT / "src" / "replknet" / "analysis"]
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", (ROOT / page).read_text())
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert len(named) > 10
    assert [name for name in missing if "NAME" not in name] == []


def test_pre_commit_and_ci_use_the_versions_that_the_project_names():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"\bruff==([\d.]+)", hooks)) == {pins["ruff"]}
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert re.findall(r'- torch: "(.*)"', workflow) == [f"{oldest}.0", pins["torch"]]
    assert f'torchvision: "{pins["torchvision"]}"' in workflow


def test_readme_and_changelog_name_every_command():
    assert f"`replknet {' | '.join(COMMANDS)}`" in (ROOT / "CHANGELOG.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if not re.search(rf"^replknet .*\b{name}\b", readme, re.MULTILINE)] == []


@pytest.mark.full
def test_three_lines_run_a_script_of_timms_with_our_networks(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    print(type(timm.create_model(sys.argv[1])).__name__, sys.argv[1:])\n"
    )
    command = [sys.executable, "-W", "ignore", ROOT / "docs/examples/with_replknet.py", "script.py", "replknet_test"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == "RepLKNet ['replknet_test']\n", result.stderr
