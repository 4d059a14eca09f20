"""Shared by all tests: NaN in uninitialised memory, options and skips that say why."""

import os

import pytest
import torch
from safetensors.torch import save_file

from replknet import kernels
from replknet.kernels import native_core
from scenes import draw

try:
    from hypothesis import settings
except ImportError:
    # the tests on a GPU need torch, timm, numpy and pytest alone
    pass
else:
    # the same examples every time: `make test-all` asks for it by --hypothesis-profile
    settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, print_blob=True)
    settings.register_profile("exploring", deadline=None)
    settings.load_profile("repeatable" if os.environ.get("CI") else "exploring")

# each worker of pytest-xdist gets its share of the processors
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked full as well, as `make test-all` does")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not config.getoption("--full"):
        reasons["full"] = "of the full matrix, which `make test-all` runs"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What `torch.empty` returns is full of NaN, so an output that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def set_variable(monkeypatch):
    """Sets an environment variable that the kernels read once, and lets them read it anew."""

    def forget():
        kernels._from_environment.cache_clear()
        native_core.instruction_set.cache_clear()

    def set_variable(name, value):
        monkeypatch.setenv(name, value)
        forget()

    yield set_variable
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """A folder with a decoded data set of the right form: two colours for ten classes of 24 images."""
    folder = tmp_path_factory.mktemp("cifar")
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for split, n in (("train", 240), ("test", 60)):
        labels = torch.arange(n) % 10
        noise = torch.randint(0, 40, (n, 3, 32, 32), generator=generator)
        arrays[f"{split}_images"] = (noise + 20 * labels[:, None, None, None]).to(torch.uint8)
        arrays[f"{split}_labels"] = labels
    save_file(arrays, folder / "cifar10.safetensors")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of images with masks, in three splits."""
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder)
    return folder
