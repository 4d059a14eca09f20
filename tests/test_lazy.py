"""What an import loads, and that timm knows our networks whichever package is imported first."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader

import replknet
from matrix import matrix

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "replknet"


def run(program, cwd=None, *options):
    command = [sys.executable, *options, "-c", program]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- budgets

# packages that take long to import, or that an extra brings
HEAVY = (
    *("timm", "torchvision", "PIL", "safetensors", "huggingface_hub", "jsonargparse", "triton", "sympy", "filelock"),
    *("pytorch_lightning", "torchmetrics", "transformers", "matplotlib", "onnx", "onnxruntime", "openvino", "tqdm"),
)
# package -> modules that may come beside those of a bare `import torch`, and what they are
BUDGETS = {
    "replknet": (4, "itself and the file that lets everything else wait"),
    "replknet.data": (6, "itself and that file: a data set is imported with its name"),
    "replknet.kernels": (30, "ten files of ours for CPUs, ten for GPUs without Triton, and the statistics of timings"),
    "replknet.ops": (40, "those, and a file each for checks, schemas, computing, derivatives, sharding and doctor"),
    "replknet.nn": (50, "those, and the modules"),
    "replknet.analysis": (60, "those, and a file each for what is counted or measured"),
}


@pytest.fixture(scope="module")
def loaded():
    """Package -> the modules that come with it where torch is imported already."""
    program = f"""
import importlib, os, sys, torch
before = set(sys.modules)
for package in {list(BUDGETS)}:
    # each in a copy of this process, which has imported torch once for all
    if os.fork() == 0:
        importlib.import_module(package)
        print(package, *sorted(set(sys.modules) - before), flush=True)
        os._exit(0)
    os.wait()
"""
    return {package: names for package, *names in map(str.split, run(program).splitlines())}


@pytest.mark.parametrize("package", BUDGETS)
def test_an_import_loads_no_more_than_its_budget(package, loaded):
    budget, what = BUDGETS[package]
    names = loaded[package]
    assert package in names
    assert not {name.partition(".")[0] for name in names} & set(HEAVY)
    assert len(names) <= budget, f"{package} may load {what}, got {names}"


def test_torch_comes_with_the_first_name_that_needs_it():
    program = """
import sys
import replknet
from replknet import data
dir(replknet), replknet.__version__
print("torch" in sys.modules, "numpy" in sys.modules)
replknet.merge
print("torch" in sys.modules, "timm" in sys.modules)
"""
    assert run(program).split() == ["False", "False", "True", "False"]


# ---- names


def lazy_packages():
    return [path for path in SOURCES.glob("**/__init__.py") if "lazy_names(" in path.read_text()]


@pytest.mark.parametrize("path", lazy_packages(), ids=lambda path: path.parent.name)
def test_type_checkers_see_the_names_that_python_finds(path):
    name = ".".join(path.parent.relative_to(SOURCES.parent).parts)
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    (block,) = (block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            # this form alone is a public name for a type checker
            assert alias.asname == alias.name
            seen[alias.name] = f"{name}.{alias.name}" if node.module == name else node.module
    package = importlib.import_module(name)
    assert {key: home for key, home in seen.items() if key != "__version__"} == package._HOMES
    # packages of tasks have a few names that are there at once
    assert set(package._HOMES) <= set(package.__all__)


@pytest.mark.parametrize("path", lazy_packages(), ids=lambda path: path.parent.name)
def test_every_lazy_name_is_found_and_listed(path):
    package = importlib.import_module(".".join(path.parent.relative_to(SOURCES.parent).parts))
    assert set(package.__all__) <= set(dir(package))
    for name in package._HOMES:
        assert package.__getattr__(name) is getattr(package, name)


# ---- registration with timm


@pytest.mark.parametrize("order", matrix(["timm, replknet", "replknet, timm"], ["timm, replknet"]))
def test_the_first_snippet_of_the_readme_runs_in_either_order(order, tmp_path):
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    first, *rest = snippet.splitlines()
    assert first == "import timm, replknet"
    # the smallest network in place of the largest, and its weights in place of those that people download
    rest = "\n".join(rest).replace("replknet_31b", "replknet_test")
    torch.save(timm.create_model("replknet_test", num_classes=1000).state_dict(), tmp_path / "test.pth")
    rest, files = re.subn(r'"[^"]+\.pth"', '"test.pth"', rest)
    assert files == 1
    program = f"import {order}\nimport torch\nimages = torch.ones(2, 3, 64, 64)\n{rest}\nprint(tuple(logits.shape))"
    assert run(program, tmp_path, "-W", "error::RuntimeWarning") == "(2, 1000)\n"


WORKER = """
import replknet
from timm.models import create_model
from torch.utils.data import Dataset

class Names(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return type(create_model("replknet_test")).__name__
"""


@pytest.mark.full
def test_a_worker_process_that_imports_us_first_has_our_networks(tmp_path, monkeypatch):
    (tmp_path / "worker_of_a_test.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    names = importlib.import_module("worker_of_a_test").Names()
    assert list(DataLoader(names, num_workers=1, multiprocessing_context="spawn")) == [["RepLKNet"]]


@pytest.mark.full
def test_threads_that_import_timm_and_us_at_once_all_arrive():
    program = """
import threading
import replknet

def work(name):
    start.wait()
    exec(f"import {name}", {})

names = ["timm", "replknet.models", "replknet.data.images", "replknet.data.transforms"]
start, errors = threading.Barrier(len(names)), []
threading.excepthook = lambda args: errors.append(repr(args.exc_value))
threads = [threading.Thread(target=work, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import timm
print(errors, timm.is_model("replknet_test"))
"""
    assert run(program) == "[] True\n"


def test_a_pickled_network_brings_its_package(tmp_path):
    torch.save(timm.create_model("replknet_test"), tmp_path / "model.pt")
    program = """
import torch
model = torch.load("model.pt", weights_only=False)
import timm
print(type(model).__name__, type(timm.create_model("mobilenetv2_lk")).__name__)
"""
    assert run(program, tmp_path) == "RepLKNet MobileNetV2\n"


def test_reloading_registers_nothing_twice():
    # timm warns when a name is registered again, and a warning is an error here
    before = list(sys.meta_path)
    importlib.reload(replknet)
    importlib.reload(timm)
    assert sys.meta_path == before
    assert timm.is_model("replknet_31b")


def test_timm_is_imported_even_where_our_networks_cannot_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "replknet.models", None)
    with pytest.warns(RuntimeWarning, match=r"not registered with timm: import of replknet\.models halted"):
        importlib.reload(replknet)
