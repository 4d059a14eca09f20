"""How kernels are started: by Triton once, and then directly, with little Python in the way. Nothing runs on a GPU."""

import sys
from collections import namedtuple

import pytest
import torch

from replknet.bench.overhead import without_launches
from replknet.ops import depthwise_conv2d

triton = pytest.importorskip("triton")

# it imports triton
from replknet.kernels.triton_launch import Launch, compiling, known, one  # noqa: E402

Compiled = namedtuple("Compiled", "run function packed_metadata")


class Kernel:
    """Stands for a kernel of Triton's."""

    arg_names = ("x", "y", "n", "m", "SIZE", "FLAG")

    def __init__(self):
        self.by_triton = []
        self.direct = []

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.by_triton.append((grid, arguments, constants))
            return Compiled(lambda *given: self.direct.append(given), "function", "metadata")

        return start

    def warmup(self, *arguments, grid, **constants):
        self.by_triton.append(("compiled", grid, arguments, constants))
        return "compiled"


@pytest.fixture
def driver(monkeypatch):
    """A driver of a device that is not here."""

    class Driver:
        stream = 77

        def get_current_device(self):
            return 3

        def get_current_stream(self, device):
            assert device == 3
            return self.stream

    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    return found


def launch(kernel):
    return Launch(kernel, 12, (5, 6), {"FLAG": True, "SIZE": 64}, num_warps=4)


@pytest.mark.usefixtures("driver")
def test_the_first_call_is_tritons_and_the_others_are_direct():
    kernel = Kernel()
    start = launch(kernel)
    x, y = torch.zeros(3), torch.zeros(4)
    start(x, y)
    assert kernel.by_triton == [((12,), (x, y, 5, 6), {"FLAG": True, "SIZE": 64, "num_warps": 4})]
    assert kernel.direct == []
    z = torch.zeros(5)
    start(z, y)
    assert len(kernel.by_triton) == 1
    # the compiled kernel gets its arguments in the order of its parameters
    [given] = kernel.direct
    assert given == (
        *(12, 1, 1, 77, "function", "metadata", None, None, None),
        *(z.data_ptr(), y.data_ptr(), 5, 6, 64, True),
    )


def test_each_call_asks_for_the_current_stream(driver):
    kernel = Kernel()
    start = launch(kernel)
    x = torch.zeros(3)
    start(x, x)
    for stream in (1, 2):
        driver.stream = stream
        start(x, x)
    assert [given[3] for given in kernel.direct] == [1, 2]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_that_has_hooked_itself_into_triton_sees_every_launch(name):
    kernel = Kernel()
    start = launch(kernel)
    x = torch.zeros(3)
    start(x, x)
    chain = getattr(triton.knobs.runtime, name)

    def hook(metadata):
        """Of a profiler."""

    chain.add(hook)
    try:
        start(x, x)
    finally:
        chain.remove(hook)
    start(x, x)
    assert (len(kernel.by_triton), len(kernel.direct)) == (2, 1)


def test_compiling_starts_nothing_and_keeps_nothing():
    kernel = Kernel()
    start = launch(kernel)
    x = torch.empty(3, device="meta")
    with compiling() as outer, compiling() as found:
        start(x, x)
    assert found == ["compiled"]
    assert outer == []
    assert start._direct is None


def test_numbers_that_the_compiler_knows_are_constants_to_it():
    assert isinstance(known(7), triton.language.constexpr)
    assert isinstance(one(1), triton.language.constexpr)
    assert one(2) == 2
    assert type(one(2)) is int


def python_calls(run):
    """Functions written in Python that a call goes through."""
    found = []

    def note(frame, event, argument):
        if event == "call":
            found.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("layout", "forward", "backward"),
    [(torch.contiguous_format, 41, 78), (torch.channels_last, 48, 87)],
    ids=["nchw", "nhwc"],
)
def test_a_call_goes_through_little_python(layout, forward, backward):
    x = torch.randn(1, 16, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=layout)
    weight = torch.randn(16, 1, 13, 13, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    with without_launches():
        with torch.inference_mode():
            for _ in range(3):
                depthwise_conv2d(x, weight)
            calls = python_calls(lambda: depthwise_conv2d(x, weight))
        assert len(calls) <= forward, calls
        x.requires_grad_()
        weight.requires_grad_()
        for _ in range(2):
            torch.autograd.grad(depthwise_conv2d(x, weight), (x, weight), dy)
        y = depthwise_conv2d(x, weight)
        # a CPU's gradients are computed in this thread
        calls = python_calls(lambda: torch.autograd.grad(y, (x, weight), dy))
        assert len(calls) <= backward, calls
