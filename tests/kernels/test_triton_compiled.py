"""The Triton kernels compiled ahead for every device of the plan: nothing spills, and everything fits. Nothing runs."""

from functools import partial
from itertools import product

import pytest
import torch

from matrix import FULL, matrix
from replknet.kernels import triton_run
from replknet.kernels.triton_plan import Family, PatchTile, forward_tiles, gradient_tiles

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
FAMILIES: list[Family] = ["sm_80", "sm_90", "sm_100"]

# n, c, h, w, kernel sides: the layers of RepLKNet-31B at 224 and 512 pixels, of Table 1, few images, extreme ones
SHAPES = [
    (64, 128, 56, 56, 31, 31),
    (64, 256, 28, 28, 29, 29),
    (64, 512, 14, 14, 27, 27),
    (64, 1024, 7, 7, 13, 13),
    (4, 128, 128, 128, 31, 31),
    (1, 128, 56, 56, 31, 31),
    (1, 512, 14, 14, 27, 27),
    (4, 512, 32, 32, 27, 27),
    (64, 384, 64, 64, 7, 7),
    (8, 100, 60, 75, 51, 5),
    (64, 32, 130, 130, 127, 127),
    # offsets of 64 bits
    (1, 2, 50000, 50000, 13, 13),
]


def compiled_faults(device, shape, dtype, tf32=False, layout=torch.contiguous_format, candidates=False, any_size=False):
    """What is wrong with the kernels that the plan gives a call, by direction; or with all that are tried for it."""
    import triton_compile

    n, c, h, w, kh, kw = shape
    kh, kw = min(kh, 2 * h - 1), min(kw, 2 * w - 1)  # taps that only meet padding are left out
    limits = triton_compile.DEVICES[device]
    x = torch.empty((n, c, h, w), dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty((c, 1, kh, kw), dtype=dtype, device="meta")
    facts = (n, c, h, w), (kh, kw), dtype, tf32
    forward = forward_tiles(*facts, not x.is_contiguous(), device, any_size)
    gradient = gradient_tiles(*facts, device, any_size)
    if not candidates:
        forward, gradient = forward[:1], gradient[:1]
    calls = [("forward", tile, partial(triton_run.run, tile, x, weight, None, False)) for tile in forward]
    calls += [("gradient", tile, partial(triton_run.run_gradient, tile, x, x, kh, kw)) for tile in gradient]
    found = {}
    for direction, tile, call in calls:
        for code in triton_compile.compiled(limits, call):
            instruction = None
            if isinstance(tile, PatchTile) and code.kernel in ("_forward", "_products"):
                instruction = limits.matrix_instruction
                if direction == "forward" and tile.samples < 64:
                    instruction = "HMMA"  # the newer ones have 64 rows and more
                if direction == "gradient" and dtype == FLOAT:
                    instruction = (
                        "HMMA"  # their TF32 operands are stored by columns, which those of the gradient are not
                    )
            if faults := code.faults(limits, instruction):
                found[f"{direction} {code.kernel} {tile}"] = faults
    return found


@pytest.mark.parametrize(
    ("device", "shape"),
    matrix(product(FAMILIES, SHAPES), [("sm_80", SHAPES[6]), ("sm_90", SHAPES[3]), ("sm_100", SHAPES[-1])]),
    ids=str,
)
def test_the_tiles_of_the_plan_fit_their_devices(device, shape):
    assert compiled_faults(device, shape, BRAIN) == {}


@pytest.mark.parametrize(
    ("device", "shape"),
    matrix(product(FAMILIES, [(64, 100, 60, 75, 31, 31), SHAPES[3]]), [("sm_80", SHAPES[3])]),
    ids=str,
)
def test_the_tiles_of_channels_last_fit_their_devices(device, shape):
    assert compiled_faults(device, shape, BRAIN, layout=torch.channels_last) == {}


@pytest.mark.parametrize(
    ("device", "dtype", "tf32"),
    matrix([(d, *t) for d, t in product(FAMILIES, [(BRAIN, False), (FLOAT, True)])], [("sm_80", BRAIN, False)]),
    ids=str,
)
def test_the_tiles_of_layers_that_change_in_size_fit_their_devices(device, dtype, tf32):
    assert compiled_faults(device, (2, 256, 100, 152, 29, 29), dtype, tf32, any_size=True) == {}


@pytest.mark.full
@pytest.mark.parametrize("device", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_autotuner_tries_fits_its_device(device, shape):
    assert compiled_faults(device, shape, BRAIN, candidates=True) == {}


TYPES = [(HALF, False), (FLOAT, False), (FLOAT, True)]


@pytest.mark.parametrize(
    ("device", "dtype", "tf32"),
    matrix([(d, *t) for d, t in product(FAMILIES, TYPES)], [("sm_80", FLOAT, True)]),
    ids=str,
)
def test_the_tiles_of_other_types_fit_their_devices(device, dtype, tf32):
    assert compiled_faults(device, SHAPES[0], dtype, tf32) == {}


@pytest.mark.parametrize(
    ("device", "tile", "instruction", "fault"),
    [
        ("sm_80", PatchTile(), None, "registers are spilled"),
        pytest.param("sm_100", PatchTile(samples=128), None, "tensor memory", marks=FULL),
        pytest.param("sm_90", PatchTile(samples=256, heights=4, warps=8), None, "shared memory", marks=FULL),
        # fewer rows than the instruction has
        pytest.param("sm_90", PatchTile(samples=32), "HGMMA", "no HGMMA", marks=FULL),
    ],
    ids=str,
)
def test_a_tile_that_does_not_fit_is_found(device, tile, instruction, fault):
    import triton_compile

    x, weight = (torch.empty(size, dtype=BRAIN, device="meta") for size in ((64, 128, 56, 56), (128, 1, 31, 31)))
    limits = triton_compile.DEVICES[device]
    codes = triton_compile.compiled(limits, partial(triton_run.run, tile, x, weight, None, False))
    assert any(fault in found for code in codes for found in code.faults(limits, instruction))
