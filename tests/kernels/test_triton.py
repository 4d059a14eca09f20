"""The Triton kernels: right in the interpreter, and right on a GPU."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracle import excess, excess_of
from replknet.kernels import Call, measured, reference, triton, triton_device, triton_run, triton_tune, use_backend
from replknet.kernels.triton_plan import (
    DirectTile,
    Family,
    PatchTile,
    family,
    forward_tile,
    forward_tiles,
    geometry,
    gradient_tile,
    gradient_tiles,
)
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
FAMILIES: list[Family] = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def interpreted(request):
    """Group -> its cases in the interpreter, as names and errors. A process starts slowly: one does all."""
    # the interpreter is chosen when the kernels are defined
    command = [sys.executable, Path(__file__).with_name("interpreted.py")]
    if request.config.getoption("--full"):
        command.append("--full")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found = defaultdict(list)
    for line in result.stdout.splitlines():
        group, *case = json.loads(line)
        found[group].append(case)
    return found


def test_copies_between_layouts_are_exact_in_the_interpreter(interpreted):
    assert len(interpreted["layouts"]) >= 3


def test_compile_autocast_checkpointing_and_ddp_work_in_the_interpreter(interpreted, request):
    roads = {name for name, _ in interpreted["roads"]}
    assert roads >= {"eager", "autocast", "inference mode", "channels_last"}
    if request.config.getoption("--full"):
        assert roads >= {"compile", "checkpointing", "DDP"}


@pytest.mark.parametrize(("group", "count"), [("strips", 14), ("compared", 5), ("infinity", 6)])
def test_what_is_around_the_kernels_works_in_the_interpreter(interpreted, group, count):
    assert len(interpreted[group]) >= count


@pytest.mark.parametrize(("group", "count"), [("patch", 7), ("direct", 3)])
def test_the_kernels_keep_the_bound_in_the_interpreter(interpreted, group, count):
    assert len(interpreted[group]) >= count
    for name, found in interpreted[group]:
        assert found.keys() == {"y", "dx", "dw", "db", "bias and relu"}
        assert max(found.values()) <= 1, (name, found)


def test_the_plane_kernels_keep_the_bound_and_their_memory_in_the_interpreter(interpreted):
    assert len(interpreted["plane"]) >= 7
    for name, found in interpreted["plane"]:
        assert found.keys() == {"y", "dx", "dw", "db"}
        assert max(found.values()) <= 1, (name, found)


def test_families_of_devices():
    assert [family(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))] == [
        *["sm_80"] * 2, "sm_90", *["sm_100"] * 2, "sm_80"
    ]  # fmt: skip


def test_small_kernels_and_exact_float32_are_summed_directly():
    shape = (64, 128, 56, 56)
    for device in FAMILIES:
        assert isinstance(forward_tile(shape, (5, 5), BRAIN, False, False, device), DirectTile)
        assert isinstance(forward_tile(shape, (31, 31), FLOAT, False, False, device), DirectTile)
        assert isinstance(gradient_tile(shape, (31, 31), FLOAT, False, device), DirectTile)
        assert isinstance(forward_tile(shape, (31, 31), FLOAT, True, False, device), PatchTile)
        assert isinstance(forward_tile(shape, (7, 3), HALF, False, False, device), PatchTile)


def test_the_blocks_of_a_kernel_cover_it():
    for kw in range(1, 130, 2):
        for kh in (1, 3, 8, 31, 127):
            g = geometry(20, 70, kh, kw, PatchTile())
            assert g.left <= -(kw // 2)
            assert g.left % 8 == 0
            # the last pixel of a patch reaches kw // 2 further
            assert g.left + 16 * g.groups * g.blocks >= 16 + kw // 2
            assert 4 * g.depth >= 4 + kh - 1
            assert g.blocks <= 3


def test_tf32_is_taken_only_where_torch_allows_it():
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    try:
        # what set_float32_matmul_precision sets is of matrix products alone
        for of_products in ("ieee", "tf32"):
            products.fp32_precision = of_products
            for of_convolutions in ("ieee", "tf32"):
                convolutions.fp32_precision = of_convolutions
                assert triton_run.allows_tf32() == (of_convolutions == "tf32")
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def test_the_older_tf32_switch_counts_as_well():
    program = """
import torch
from replknet.kernels.triton_run import allows_tf32
found = [allows_tf32()]
for allowed in (False, True):
    torch.backends.cudnn.allow_tf32 = allowed
    found.append(allows_tf32())
print(found)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[True, False, True]\n"


def call(**changes):
    return Call(**{"shape": (1, 2, 8, 8), "kernel": (7, 7), "dtype": FLOAT, "device": "cuda", **changes})


def present(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_a_refusal_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.BACKEND.refusal(call(device="cpu")) == "runs on CUDA devices only"
    assert triton.BACKEND.refusal(call(dtype=torch.float64)) == "takes float32, float16 and bfloat16"
    assert triton.BACKEND.refusal(call(algorithm="fft")) == "has no Fourier transforms"
    assert "spreads an infinity or NaN" in triton.BACKEND.refusal(call(algorithm="direct"))
    assert triton.BACKEND.refusal(call()) == "there is no CUDA device"
    present(monkeypatch, (7, 5))
    assert triton.BACKEND.refusal(call()) == "needs a device of capability 8.0 or more, cuda:0 has 7.5"
    present(monkeypatch, (9, 0))
    assert triton.BACKEND.refusal(call()) is None
    monkeypatch.setattr(triton, "_has_triton", lambda: False)
    assert triton.BACKEND.refusal(call()) == "needs the package triton"


# ---- on a GPU ----


@pytest.fixture(autouse=True)
def _exact_float32(request):
    """The bound is that of float32 sums; torch itself would let convolutions multiply in TF32."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    if "gpu" in request.keywords:
        setting.fp32_precision = "ieee"
    yield
    setting.fp32_precision = before


ON_GPU = [
    (3, 5, 9, 11, 5, 5),
    (2, 3, 4, 5, 13, 7),
    (70, 3, 20, 37, 31, 31),
    (4, 2, 64, 70, 1, 127),
    (64, 256, 28, 28, 29, 29),
    (64, 512, 14, 14, 27, 27),
    (64, 1024, 7, 7, 13, 13),
    (1, 8, 56, 56, 31, 31),
]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, BRAIN) for shape in ON_GPU] + [(shape, dtype) for dtype in (FLOAT, HALF) for shape in ON_GPU[:4]],
    ids=str,
)
def test_the_kernels_keep_the_bound_on_a_gpu(shape, dtype, layout):
    n, c, h, w, kh, kw = shape
    x, dy = (torch.randn(n, c, h, w, device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(2))
    weight = (torch.randn(c, 1, kh, kw, device="cuda") / max(kh, kw)).to(dtype)
    found = excess(triton.BACKEND, x, weight, dy)
    assert max(found.values()) <= 1, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FLOAT])
@pytest.mark.parametrize("shape", ON_GPU[:4], ids=str)
def test_the_default_keeps_the_bound_on_a_gpu(shape, dtype):
    n, c, h, w, kh, kw = shape
    x, dy = (torch.randn(n, c, h, w, device="cuda").to(dtype) for _ in range(2))
    weight = (torch.randn(c, 1, kh, kw, device="cuda") / max(kh, kw)).to(dtype)
    found = excess(measured.BACKEND, x, weight, dy)
    assert max(found.values()) <= 1, found
    assert triton_device.device_at(0).broken == {}


@pytest.mark.gpu
@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 14, 14, 27, 27), (40, 8, 7, 7, 13, 13), (40, 2, 30, 35, 13, 9)], ids=str)
def test_every_tile_that_may_be_chosen_keeps_the_bound_on_a_gpu(shape, any_size):
    n, c, h, w, kh, kw = shape
    x, dy = (torch.randn(n, c, h, w, device="cuda").to(BRAIN) for _ in range(2))
    weight = (torch.randn(c, 1, kh, kw, device="cuda") / max(kh, kw)).to(BRAIN)
    device = family(torch.cuda.get_device_capability())
    facts = (n, c, h, w), (kh, kw), BRAIN, False
    forward, gradient = forward_tiles(*facts, False, device, any_size), gradient_tiles(*facts, device, any_size)
    for i in range(max(len(forward), len(gradient))):
        first, second = forward[i % len(forward)], gradient[i % len(gradient)]
        got = {
            "y": triton_run.run(first, x, weight, None, False),
            "dx": triton_run.run(first, dy, weight, None, False, True),
            "dw": triton_run.run_gradient(second, dy, x, kh, kw),
            "db": dy.float().sum((0, 2, 3)).to(BRAIN),
        }
        found = excess_of(got, x, weight, dy)
        assert max(found.values()) <= 1, (first, second, found)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_kept_strips_live_beside_torchs_own_graphs_on_a_gpu(mode):
    module = DepthwiseConv2d(8, 13).cuda().to(BRAIN).requires_grad_(False)
    x = torch.randn(2, 8, 20, 20, device="cuda", dtype=BRAIN)
    compiled = torch.compile(module, mode=mode, fullgraph=True)
    for step in range(5):
        with torch.inference_mode():
            found = compiled(x).clone()
            expected = reference.forward(x.double(), module.weight.double(), module.bias.double(), False)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
        module.weight.data.mul_(-1 - step)


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_on_a_gpu():
    x, dy = (torch.randn(64, 16, 56, 56, device="cuda", dtype=BRAIN) for _ in range(2))
    weight = torch.randn(16, 1, 31, 31, device="cuda", dtype=BRAIN) / 31
    y = triton.BACKEND.forward(x, weight, None, False, "auto")
    _, dw, _ = triton.BACKEND.backward(dy, x, weight, [False, True, False], "auto")
    for _ in range(20):
        assert torch.equal(triton.BACKEND.forward(x, weight, None, False, "auto"), y)
        assert torch.equal(triton.BACKEND.backward(dy, x, weight, [False, True, False], "auto")[1], dw)


@pytest.fixture
def by_name():
    with use_backend("triton"):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("by_name")
def test_compile_graphs_autocast_and_checkpointing_work_on_a_gpu():
    module = DepthwiseConv2d(8, 13).cuda()
    x = torch.randn(2, 8, 20, 20, device="cuda", requires_grad=True)
    expected = reference.forward(x.double(), module.weight.double(), module.bias.double(), False)
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2, check_dtype=False)
    close(torch.compile(module, fullgraph=True)(x), expected)
    with torch.autocast("cuda", dtype=BRAIN):
        y = module(x)
        assert y.dtype == BRAIN
        close(y, expected)
    checkpointed = checkpoint(module, x, use_reentrant=False)
    checkpointed.sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        static = x.detach().clone()
        depthwise_conv2d(static, module.weight, module.bias)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = depthwise_conv2d(static, module.weight, module.bias)
        graph.replay()
        close(result, expected)


@pytest.mark.gpu
def test_the_default_times_each_direction_once_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_device, "autotuned", lambda: True)
    torch.use_deterministic_algorithms(False)
    for cache in (triton_tune.table_of, triton_device.device_at):
        cache.cache_clear()
    try:
        module = DepthwiseConv2d(8, 13).cuda().to(BRAIN)
        x = torch.randn(4, 8, 20, 20, device="cuda", dtype=BRAIN, requires_grad=True)
        module(x).sum().backward()
        table = json.loads(next((tmp_path / "replknet").glob("*.json")).read_text())
        assert {kind.split()[0] for kind in table["kinds"]} == {"forward", "dx", "dw"}
        assert all(entry["torch_ms"] > 0 for entry in table["kinds"].values())
        assert set(table["checks"].values()) == {"right"}
        expected = reference.forward(x.double(), module.weight.double(), module.bias.double(), False)
        torch.testing.assert_close(module(x).double(), expected, rtol=2e-2, atol=2e-2)
    finally:
        for cache in (triton_tune.table_of, triton_device.device_at):
            cache.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("by_name")
def test_distributed_data_parallel_works_on_a_gpu(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        module = DepthwiseConv2d(8, 13).cuda()
        x = torch.randn(2, 8, 20, 20, device="cuda")
        module(x).square().sum().backward()
        expected = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        torch.nn.parallel.DistributedDataParallel(module)(x).square().sum().backward()
        for p, grad in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_a_second_device_and_another_stream_are_used_as_they_are():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.randn(2, 4, 20, 20, device=device)
    weight = torch.randn(4, 1, 13, 13, device=device) / 13
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            shifted = x + 1  # only there, late
            y = triton.BACKEND.forward(shifted, weight, None, False, "auto")
        stream.synchronize()
    expected = reference.forward((x + 1).double(), weight.double(), None, False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
