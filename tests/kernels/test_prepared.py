"""What is prepared from weights belongs to them, is bounded, and dies with them."""

import gc
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from matrix import matrix
from replknet.deploy import optimize
from replknet.kernels import native, prepared
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

SHAPE, KERNEL = (1, 32, 20, 18), (13, 13)


@dataclass
class Form:
    nbytes: int
    used: int


@pytest.fixture(autouse=True)
def _nothing_kept():
    # a collection then looks at what the test makes alone
    gc.freeze()
    prepared._owners.clear()
    yield
    prepared._owners.clear()
    gc.unfreeze()


def layer():
    return DepthwiseConv2d(SHAPE[1], KERNEL)


def test_it_dies_with_its_weight():
    conv, x = layer(), torch.randn(SHAPE)
    conv(x).sum().backward()
    assert prepared.held_bytes() > 0
    del conv
    gc.collect()
    assert prepared.held_bytes() == 0
    assert not prepared._owners


def test_it_dies_with_a_weight_in_a_cycle_and_in_another_thread():
    conv, x = layer(), torch.randn(SHAPE)
    conv.itself = [conv]
    thread = threading.Thread(target=lambda conv: conv(x).sum().backward(), args=(conv,))
    thread.start()
    thread.join()
    assert prepared.held_bytes() > 0
    del conv, thread
    gc.collect()
    assert prepared.held_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_that_autocast_makes_keep_nothing_of_their_own(dtype):
    conv, x = layer(), torch.randn(SHAPE)
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            conv(x).float().sum().backward()
    assert list(prepared._owners) == [id(conv.weight)]
    after_three = prepared.held_bytes()
    for _ in range(30):
        with torch.autocast("cpu", dtype):
            conv(x).float().sum().backward()
    assert prepared.held_bytes() == after_three > 0
    del conv
    gc.collect()
    assert prepared.held_bytes() == 0


@pytest.fixture
def remade(monkeypatch):
    """The blocks of weights that each call of the core prepares anew."""
    found = []

    def counting(original, *arguments):
        found.append(original(*arguments))
        return found[-1]

    for name in ("_convolved", "_write_gradients"):
        monkeypatch.setattr(native, name, partial(counting, getattr(native, name)))
    return found


def test_autocast_prepares_a_weight_once(remade):
    conv, x = layer(), torch.randn(SHAPE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            conv(x)
    assert remade == [2, 0, 0]


def test_a_weight_that_is_not_dense_is_prepared_once(remade):
    x = torch.randn(SHAPE)
    weight = torch.randn(SHAPE[1], 2, *KERNEL)[:, :1]
    for _ in range(3):
        depthwise_conv2d(x, weight)
    assert remade == [2, 0, 0]
    assert list(prepared._owners) == [id(weight)]


def test_a_training_step_prepares_a_computed_weight_once_and_keeps_nothing(remade):
    """Spectra of the whole image serve the forward pass and both gradients."""
    x, parameter = torch.randn(1, 32, 30, 30, requires_grad=True), torch.randn(32, 1, 21, 21, requires_grad=True)
    y = depthwise_conv2d(x, parameter * 2, algorithm="fft")
    assert prepared.held_bytes() > 0
    y.sum().backward()
    assert remade == [2, 0]
    gc.collect()
    assert prepared.held_bytes() == 0


def test_an_address_that_comes_back_owns_nothing():
    x = torch.randn(SHAPE)
    for _ in range(50):
        weight = torch.randn(SHAPE[1], 1, *KERNEL)
        assert not prepared.forms_of(weight)
        depthwise_conv2d(x, weight)
        assert len(prepared._owners) == 1
        del weight


def test_what_was_used_longest_ago_goes_first():
    weights = [torch.randn(1) for _ in range(4)]
    for weight, used in zip(weights, (3, 1, 2, 4), strict=True):
        prepared.forms_of(weight)["form"] = Form(100, used)
    prepared.make_room(150, limit=400)
    assert [bool(prepared.forms_of(weight)) for weight in weights] == [True, False, False, True]
    prepared.make_room(200, limit=400)
    assert prepared.held_bytes() == 200


def test_calls_of_many_shapes_end_at_the_limit(monkeypatch):
    monkeypatch.setattr(prepared, "LIMIT_BYTES", 1_000_000)
    conv = layer()
    with torch.no_grad():
        for height in range(8, 60, 3):
            for width in range(8, 60, 5):
                conv(torch.randn(1, SHAPE[1], height, width))
    largest = max(form.nbytes for form in prepared.forms_of(conv.weight).values())
    assert 1_000_000 - largest < prepared.held_bytes() <= 1_000_000


RANDOM_SHAPES = """
import random, resource, sys
import torch
from replknet.kernels import prepared
from replknet.nn import DepthwiseConv2d

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

calls, side = map(int, sys.argv[1:])
torch.set_num_threads(1)
random.seed(0)
convs = [DepthwiseConv2d(16, k) for k in (3, 7, 13, 31)]
seen = []
with torch.no_grad():
    for call in range(calls):
        random.choice(convs)(torch.zeros(1, 16, random.randint(1, side), random.randint(1, side)))
        if call % (calls // 4) == calls // 4 - 1:
            seen.append(resident_mb())
print(prepared.held_bytes() / 1e6, *seen)
"""


# calls, largest side of the map, MB of all forms of four layers of 16 channels, and growth of the last quarter
PLATEAUS = [(3000, 16, 6.5, 3), (10_000, 40, 25, 5)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("calls", "side", "most_mb", "grown_mb"), matrix(PLATEAUS, PLATEAUS[:1]))
def test_calls_of_random_shapes_end_at_a_plateau(calls, side, most_mb, grown_mb):
    """The process grows no more once it has all forms."""
    command = [sys.executable, "-c", RANDOM_SHAPES, str(calls), str(side)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    held, *resident = map(float, result.stdout.split())
    assert held < most_mb
    assert resident[-1] - resident[-2] < grown_mb, resident


def test_optimize_leaves_nothing_with_the_source():
    model = torch.nn.Sequential(layer(), torch.nn.BatchNorm2d(SHAPE[1])).eval()
    optimized = optimize(model, torch.randn(SHAPE))
    assert not prepared.forms_of(model[0].weight)
    assert prepared.held_bytes() > 0
    del optimized
    gc.collect()
    assert prepared.held_bytes() == 0
