"""Maps that change in size: few compilations, and machine code that is no worse for it. Nothing runs here."""

import random
from functools import partial

import pytest
import torch

from matrix import matrix
from replknet.kernels import triton_choice
from replknet.kernels.triton_plan import forward_tile, gradient_tile
from replknet.kernels.triton_run import run, run_gradient

BRAIN = torch.bfloat16
# channels, pixels of the image that one of the map stands for, kernel: the stages of RepLKNet-31B
STAGES = [(128, 4, 31), (256, 8, 29), (512, 16, 27), (1024, 32, 13)]


def coco_sizes(count):
    """Heights and widths of batches as detection has them: a short side of 480 to 800 pixels, padded to 32."""
    r = random.Random(0)
    for _ in range(count):
        short = r.choice(range(480, 801, 32))
        long = min(1333, int(short * r.uniform(1, 2)))
        sides = (short, long) if r.random() < 0.7 else (long, short)
        yield tuple(-(-side // 32) * 32 for side in sides)


@pytest.fixture
def compilations(monkeypatch):
    """What Triton would compile, on the compile-only road of a device that is not here; nothing is compiled."""
    import triton

    import triton_compile
    from replknet.kernels import triton_layout, triton_patch, triton_strips
    from replknet.kernels.triton_launch import compiling

    found = []

    def note(self, key, signature, device, *_):
        found.append(self.fn.__name__)
        self.device_caches[device][0][key] = kernel = object()
        return kernel

    patch = (triton_patch._forward, triton_patch._products, triton_patch._taps)
    for kernel in (triton_layout._copy, triton_strips._strips, *patch):
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", note)
    with triton_compile.standing_in(triton_compile.DEVICES["sm_90"]), compiling():
        yield found


@pytest.mark.parametrize("images", matrix([(1,), (2,), (16,)], [(2,)]))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("channels", "stride", "k"), STAGES)
def test_a_layer_of_a_detector_compiles_a_handful_of_kernels_in_two_epochs(
    compilations, channels, stride, k, layout, images
):
    choice = triton_choice.Choice(measured=True)
    sizes = {(h // stride, w // stride) for h, w in coco_sizes(2 * 200)}
    assert len(sizes) > 200
    weight = torch.empty(channels, 1, k, k, dtype=BRAIN, device="meta", requires_grad=True)
    bias = torch.empty(channels, dtype=BRAIN, device="meta")
    for h, w in sorted(sizes, key=lambda size: (size[0] * size[1]) % 97):
        x = torch.empty(images, channels, h, w, dtype=BRAIN, device="meta", memory_format=layout)
        for direction, with_bias in (("forward", True), ("dx", False), ("dw", False)):
            margin, kernel = triton_choice._inside(x, weight)
            assert not any(margin)
            work = triton_choice.work_of(x, kernel, with_bias, False, direction == "dx")
            tile = choice._question(direction, work, weight).tiles()[0]
            if direction == "dw":
                run_gradient(tile, x, x, *kernel)
            else:
                run(tile, x, weight, bias if with_bias else None, False, direction == "dx")
    assert 5 <= len(compilations) <= 12, compilations


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_what_is_compiled_ahead_is_what_a_call_starts(compilations, layout):
    x = torch.empty(5, 128, 30, 35, dtype=BRAIN, device="meta", memory_format=layout)
    weight = torch.empty(128, 1, 13, 9, dtype=BRAIN, device="meta")
    bias = torch.empty(128, dtype=BRAIN, device="meta")
    for direction in ("forward", "dx", "dw"):
        work = triton_choice.work_of(x, (13, 9), direction == "forward", direction == "forward", direction == "dx")
        question = triton_choice.Question(direction, work, (13, 9))
        for tile in question.tiles():
            question.compile(tile)
            ahead = len(compilations)
            if direction == "dw":
                run_gradient(tile, x, x, 13, 9)
            else:
                run(tile, x, weight.requires_grad_(), bias if work.bias else None, work.relu, work.rotated)
            assert len(compilations) == ahead, (direction, tile)
    assert ahead > 8


@pytest.mark.parametrize("batch", [64, 63, 48])
def test_a_last_small_batch_compiles_at_most_the_two_main_kernels(compilations, batch):
    weight = torch.empty(512, 1, 27, 27, dtype=BRAIN, device="meta", requires_grad=True)

    def step(n):
        x = torch.empty(n, 512, 28, 28, dtype=BRAIN, device="meta")
        facts = x.shape, (27, 27), BRAIN, False
        run(forward_tile(*facts, False, "sm_90"), x, weight, None, False)
        run_gradient(gradient_tile(*facts, "sm_90"), x, x, 27, 27)

    step(128)
    first = len(compilations)
    step(64)
    assert len(compilations) - first <= 2
    step(batch)
    assert set(compilations[first:]) <= {"_forward", "_products"}


# H, W, kernel; registers, and instructions of a step of the loop, of kernels that were compiled for each size, with
# Triton 3.8.0 for sm_90 (commit 8a390e2)
BEFORE = {
    (64, 56, 31): {"_forward": (210, 324), "_products": (212, 390)},
    (64, 28, 29): {"_forward": (246, 342), "_products": (212, 337)},
    (64, 14, 27): {"_forward": (128, 237), "_products": (136, 385)},
    (64, 7, 13): {"_forward": (255, 357), "_products": (184, 681)},
    (32, 56, 31): {"_forward": (159, 300), "_products": (212, 401)},
}


@pytest.mark.parametrize(("n", "side", "k"), matrix(BEFORE, [(64, 14, 27)]))
def test_the_machine_code_is_about_that_of_kernels_for_one_size(n, side, k):
    import triton_compile

    device = triton_compile.DEVICES["sm_90"]
    c = {56: 128, 28: 256, 14: 512, 7: 1024}[side]
    x = torch.empty(n, c, side, side, dtype=BRAIN, device="meta")
    weight = torch.empty(c, 1, k, k, dtype=BRAIN, device="meta")
    facts = x.shape, (k, k), BRAIN, False
    calls = (
        partial(run, forward_tile(*facts, False, "sm_90"), x, weight, None, False),
        partial(run_gradient, gradient_tile(*facts, "sm_90"), x, x, k, k),
    )
    codes = {code.kernel: code for call in calls for code in triton_compile.compiled(device, call)}
    for name, (registers, instructions) in BEFORE[n, side, k].items():
        code = codes[name]
        # the gradient with few images divides by sizes in every step
        allowed = 1.25 if name == "_products" and n < 64 else 1.05
        assert code.stack_bytes == 0
        assert code.loop_instructions <= allowed * instructions, (name, code)
        # two programs a multiprocessor, as before
        assert code.registers <= max(registers, 255)
