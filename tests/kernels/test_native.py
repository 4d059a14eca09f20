"""The C++ core: that it was built and runs, that its prepared weights are never stale, and what it promises."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from matrix import matrix
from replknet.kernels import Call, native, native_core, native_plan, prepared, reference
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

SHAPE, KERNEL = (2, 24, 20, 18), (13, 13)  # large enough for transforms to be chosen
LAST = torch.channels_last


def test_the_core_was_built_and_runs():
    assert native_core.library_path() is not None, "the native kernel was not built: see the log of pip install -v"
    assert native_core.instruction_sets()["plain"]
    assert native_core.parallel_for() is not None, "torch's parallel loop was not found"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


RUNNING = [name for name, runs in native_core.instruction_sets().items() if runs]


def test_the_forced_instruction_set_is_the_one_that_runs(set_variable):
    x = torch.linspace(-1, 1, 2 * 16 * 20 * 20).reshape(2, 16, 20, 20)
    weight = torch.linspace(-1, 1, 16 * 81).reshape(16, 1, 9, 9)
    results = {}
    for name in RUNNING:
        set_variable("REPLKNET_ISA", name)
        assert native_core.instruction_set() == name
        results[name] = native.forward(x, weight, None, False)
    if "avx2" in results:
        # one fuses multiplication and addition, the other rounds between them
        assert not torch.equal(results["avx2"], results["plain"])


PRINT_NAME = "from replknet.kernels import native_core; print(native_core.instruction_set())"


@pytest.mark.parametrize("name", matrix([(name,) for name in RUNNING], [("plain",)]))
def test_the_environment_of_a_process_forces_the_instruction_set(name):
    process = run(PRINT_NAME, REPLKNET_ISA=name)
    assert process.stdout == f"{name}\n", process.stderr


def test_an_unknown_instruction_set_is_an_error(set_variable):
    set_variable("REPLKNET_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"REPLKNET_ISA=mmx: this build has .*plain"):
        depthwise_conv2d(torch.randn(1, 16, 8, 8), torch.randn(16, 1, 9, 9))


@pytest.mark.parametrize("missing", [name for name, runs in native_core.instruction_sets().items() if not runs])
def test_an_instruction_set_that_the_processor_lacks_is_an_error(set_variable, missing):
    set_variable("REPLKNET_ISA", missing)
    with pytest.raises(
        RuntimeError, match=rf"REPLKNET_ISA={missing}: this processor does not have it; it runs .*plain"
    ):
        native_core.instruction_set()


def test_the_best_instruction_set_is_chosen():
    running = [name for name, runs in native_core.instruction_sets().items() if runs]
    assert native_core.instruction_set() == os.environ.get("REPLKNET_ISA", running[0])


def test_instruction_sets_can_be_compared_in_one_process():
    x, w = torch.randn(2, 20, 9, 9), torch.randn(20, 1, 7, 7)
    results = {}
    for name in [name for name, runs in native_core.instruction_sets().items() if runs]:
        with native_core.use_instruction_set(name):
            results[name] = native.forward(x, w, None, False)
    for y in results.values():
        torch.testing.assert_close(y, reference.forward(x, w, None, False))
    if "avx2" in results:
        assert not torch.equal(results["avx2"], results["plain"])
    expected = r"use_instruction_set\('mmx'\): this build has .*plain"
    with pytest.raises(RuntimeError, match=expected), native_core.use_instruction_set("mmx"):
        pass


def image(*shape, dtype=torch.float32):
    return torch.randn(*(shape or SHAPE)).to(dtype).contiguous(memory_format=LAST)


def check(x, weight):
    got = depthwise_conv2d(x, weight)
    truth = reference.forward(x.double(), weight.double(), None, False)
    assert (got.double() - truth).norm() < 1e-6 * truth.norm()


def steps(change):
    """Weights that `change` alters, checked before and after, twice each so that the second call finds them."""
    layer = DepthwiseConv2d(SHAPE[1], KERNEL, bias=False)
    x = image()
    with torch.no_grad():
        check(x, layer.weight)
        check(x, layer.weight)
        change(layer)
        check(x, layer.weight)
        check(x, layer.weight)


def optimiser_step(**options):
    def step(layer):
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()

    return step


def assign_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def write_through_numpy(layer):
    layer.weight.detach().numpy()[3, 0, 5, 5] += 1


def load_with_assign(layer):
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        optimiser_step(fused=True),
        optimiser_step(foreach=True),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.data.neg_(),
        assign_data,
        write_through_numpy,
        load_with_assign,
    ],
    ids=["fused", "foreach", "data.mul_", "data.neg_", "data=", "numpy", "load_state_dict"],
)
def test_changed_weights_are_never_stale(change):
    steps(change)


def test_weights_at_a_freed_address_are_not_stale():
    x = image()
    # a collection then looks at what is made here alone
    gc.freeze()
    try:
        for _ in range(20):
            weight = torch.randn(SHAPE[1], 1, *KERNEL)
            check(x, weight)
            del weight
            gc.collect()
    finally:
        gc.unfreeze()


def test_weights_under_autocast_are_not_stale():
    x, weight = image(), torch.randn(SHAPE[1], 1, *KERNEL)
    for _ in range(3):
        weight.data.add_(torch.randn_like(weight))
        with torch.autocast("cpu", torch.bfloat16):
            got = depthwise_conv2d(x, weight)
        truth = reference.forward(x.bfloat16().double(), weight.bfloat16().double(), None, False)
        assert (got.double() - truth).norm() < 5e-3 * truth.norm()


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        x, weight = image(), torch.randn(SHAPE[1], 1, *KERNEL)
        check(x, weight)
        weight.mul_(-3)
        check(x, weight)


def test_only_the_changed_block_is_prepared_anew():
    x, weight = image(1, 40, 20, 18), torch.randn(40, 1, *KERNEL)
    job, y = native._job_of(x, weight, "fft"), torch.empty_like(x)

    def remade():
        return native._convolved(job, x, weight, None, False, y)

    assert remade() == 3
    assert remade() == 0
    weight[17, 0, 12, 12] += 1e-6
    assert remade() == 1


def test_a_checksum_sees_a_change_of_any_bit_and_place():
    data = torch.randn(300)
    sums = {native_core.checksum(data)}
    for i in range(data.numel()):
        for bit in (0, 13, 31):
            data.view(torch.int32)[i] ^= -(1 << 31) if bit == 31 else 1 << bit
            sums.add(native_core.checksum(data))
            data.view(torch.int32)[i] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert len(sums) == 1 + 3 * data.numel()
    swapped = data.clone()
    swapped[[10, 18]] = data[[18, 10]]
    assert native_core.checksum(swapped) != native_core.checksum(data)
    signs = data.clone()
    signs[[4, 6]] *= -1
    assert native_core.checksum(signs) != native_core.checksum(data)


def test_maps_that_a_kernel_reaches_as_far_on_share_its_prepared_weights():
    weight = torch.randn(16, 1, 7, 7)
    for size in (30, 41, 57, 58):
        native.forward(torch.randn(1, 16, size, size + 3), weight, None, False, "direct")
    assert len(prepared.forms_of(weight)) == 1
    # here taps meet padding alone, and are left out
    native.forward(torch.randn(1, 16, 3, 30), weight, None, False, "direct")
    assert len(prepared.forms_of(weight)) == 2
    for size in (40, 41, 42):
        x = torch.randn(1, 16, size, size)
        y, truth = native.forward(x, weight, None, False, "fft"), reference.forward(x, weight, None, False)
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
def test_results_repeat_to_the_bit_and_with_any_number_of_threads(algorithm, layout):
    x, dy = (torch.randn(3, 40, 30, 23).contiguous(memory_format=layout) for _ in range(2))
    weight = torch.randn(40, 1, 11, 11)

    def everything():
        dx, dw, _ = native.backward(dy, x, weight, [True, True, False], algorithm)
        return native.forward(x, weight, None, False, algorithm), dx, dw

    before = torch.get_num_threads()
    first = everything()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(first, everything(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_bias_and_relu_at_the_store(algorithm):
    x, weight, bias = image(), torch.randn(SHAPE[1], 1, *KERNEL), 10 * torch.randn(SHAPE[1])
    truth = reference.forward(x.double(), weight.double(), bias.double(), True)
    for layout in (LAST, torch.contiguous_format):
        got = depthwise_conv2d(x.contiguous(memory_format=layout), weight, bias, relu=True, algorithm=algorithm)
        assert (got >= 0).all()
        assert (got.double() - truth).norm() < 1e-6 * truth.norm()


def test_direct_keeps_nan_and_infinity_where_they_are_seen():
    x, weight = torch.randn(1, 16, 30, 30), torch.randn(16, 1, 5, 5)
    x[0, 3, 10, 10] = float("nan")
    x[0, 4, 20, 20] = float("inf")
    y = depthwise_conv2d(x, weight, relu=True, algorithm="direct")
    seen = torch.zeros(30, 30, dtype=torch.bool)
    seen[8:13, 8:13] = True
    assert torch.equal(y[0, 3].isnan(), seen)
    assert torch.isfinite(y[0, 4][seen]).all()
    assert torch.isfinite(y[0, 5:]).all()


def test_fft_spreads_nan_over_its_channel_and_no_further():
    x, weight = torch.randn(2, 16, 30, 30), torch.randn(16, 1, 21, 21)
    x[0, 3, 10, 10] = float("nan")
    y = depthwise_conv2d(x, weight, algorithm="fft")
    assert y[0, 3].isnan().all()
    y[0, 3] = 0
    assert torch.isfinite(y).all()


def test_border_rows_are_as_exact_as_the_interior():
    x, weight = image(1, 16, 56, 56), torch.randn(16, 1, 31, 31)
    error = (
        depthwise_conv2d(x, weight, algorithm="fft").double()
        - reference.forward(x.double(), weight.double(), None, False)
    ).abs()
    border = torch.ones(56, 56, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert error[..., border].square().mean() < 2 * error[..., ~border].square().mean()


def test_other_devices_and_float64_are_refused():
    call = Call(shape=(1, 16, 8, 8), kernel=(5, 5), dtype=torch.float64, device="cpu")
    assert native.BACKEND.refusal(call) == "takes float32, float16 and bfloat16"
    call = Call(shape=(1, 16, 8, 8), kernel=(5, 5), dtype=torch.float32, device="cuda")
    assert native.BACKEND.refusal(call) == "runs on CPUs only"


def test_a_kernel_too_large_for_any_transform_is_direct():
    call = Call(shape=(1, 16, 400, 400), kernel=(301, 301), dtype=torch.float32, device="cpu", algorithm="fft")
    assert native.BACKEND.refusal(call) == "has no transform long enough for this kernel"


def test_the_plan_knows_the_lengths_of_the_core():
    core, lengths = native_core.core(), []
    while length := core.rk_length(len(lengths)):
        lengths.append(length)
    assert tuple(lengths) == native_plan.LENGTHS


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_move_our_memory(device):
    x, weight = image(1, 16, 23, 31), torch.randn(16, 1, 17, 9)
    truth = reference.forward(x.double(), weight.double(), None, False)
    with torch.device(device):
        got = depthwise_conv2d(x, weight)
        dx, dw, _ = native.backward(x, x, weight, [True, True, False])
    assert (got.double() - truth).norm() < 1e-6 * truth.norm()
    assert dx.device.type == dw.device.type == "cpu"


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
def test_a_weight_gradient_alone_keeps_no_prepared_weights(algorithm):
    x, weight = image(), torch.randn(SHAPE[1], 1, *KERNEL)
    dw = native.backward(x, x, weight, [False, True, False], algorithm)[1]
    truth = reference.backward(x.double(), x.double(), weight.double(), [False, True, False])[1]
    assert (dw.double() - truth).norm() < 1e-6 * truth.norm()
    assert not prepared.forms_of(weight)
