"""What is public is on the page of the reference, and that page promises nothing else."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import replknet

# packages whose `__all__` is their interface, beside replknet itself
PACKAGES = (
    *("kernels", "ops", "nn", "models", "data", "analysis", "train", "deploy", "tasks"),
    *("tasks.classification", "tasks.segmentation", "tasks.detection"),
)

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
PUBLIC = ["replknet", *(f"replknet.{name}" for name in PACKAGES)]
# dotted name -> the members that the page shows
PROMISED = {
    name: members.split(", ") if members else []
    for name, members in re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$(?:\n   :members: (.+)$)?", PAGE, re.MULTILINE)
}


def settled(dotted):
    """Whether a name is replknet's own, or in one of the packages."""
    return dotted.count(".") == 1 or dotted.startswith(tuple(f"replknet.{name}." for name in PACKAGES))


SETTLED = list(filter(settled, PROMISED))


def thing(dotted):
    home, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(home), name)


def test_the_page_is_read():
    assert PROMISED["replknet.nn.ReparamLargeKernelConv"] == ["fuse"]
    assert {"replknet.merge", "replknet.models.CONFIGS"} <= set(SETTLED)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_documented(package):
    module = importlib.import_module(package)
    promised = [thing(name) for name in SETTLED]
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            assert f"| `{package}.{name}` |" in PAGE
        else:
            assert any(value is other for other in promised), f"docs/api.md does not explain {package}.{name}"


@pytest.mark.parametrize("dotted", SETTLED)
def test_what_the_page_promises_is_public(dotted):
    home, _, name = dotted.rpartition(".")
    assert home in PUBLIC, f"{dotted} is inside a package; let the package export it, or drop it from docs/api.md"
    assert name in importlib.import_module(home).__all__
    for member in PROMISED[dotted]:
        assert callable(getattr(thing(dotted), member)) or isinstance(getattr(thing(dotted), member), property)


@pytest.mark.parametrize("package", PUBLIC)
def test_a_star_import_gives_what_is_public(package):
    names = {}
    exec(f"from {package} import *", names)
    assert set(names) - {"__builtins__"} == set(importlib.import_module(package).__all__)


@pytest.mark.parametrize("path", [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"], ids=lambda path: path.name)
def test_a_page_names_nothing_that_is_not_there(path):
    for name in set(re.findall(rf"\breplknet\.(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)*", path.read_text())):
        found, home = replknet, "replknet"
        for part in name.split(".")[1:]:
            home = f"{home}.{part}"
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(home)
