"""The plane kernels: compilable for every device of their tiles, and right on a GPU; test_triton.py interprets them."""

from functools import partial
from itertools import product

import pytest
import torch

from matrix import matrix
from oracle import excess_of
from replknet.kernels import reference
from replknet.kernels.triton_plan import Family, PlaneTile, Work, in_one_window, padded_width, plane_tiles

HALF, BRAIN = torch.float16, torch.bfloat16
FAMILIES: list[Family] = ["sm_80", "sm_90", "sm_100"]


# n, c, h, w, kernel sides: the last two stages of RepLKNet-31B, Table 1, a small kernel, a width of 4-byte loads
SHAPES = [
    (64, 512, 14, 14, 27, 27),
    (64, 1024, 7, 7, 13, 13),
    (64, 384, 16, 16, 31, 31),
    (64, 768, 7, 7, 7, 7),
    (64, 768, 7, 7, 3, 3),
    (300, 100, 15, 6, 25, 7),
]


def faults(device, shape, layout=torch.contiguous_format, tiles=slice(None)):
    """What is wrong with the kernels of the tiles for a call, with bias and ReLU."""
    import triton_compile
    from replknet.kernels import triton_run

    n, c, h, w, kh, kw = shape
    limits = triton_compile.DEVICES[device]
    x = torch.empty((n, c, h, w), dtype=BRAIN, device="meta", memory_format=layout)
    weight, bias = (torch.empty(size, dtype=BRAIN, device="meta") for size in ((c, 1, kh, kw), (c,)))
    found = {}
    for tile in plane_tiles((n, c, h, w), (kh, kw), BRAIN, device)[tiles]:
        codes = triton_compile.compiled(limits, partial(triton_run.run, tile, x, weight, bias, True))
        [code] = [code for code in codes if code.kernel in ("_by_patches", "_flat")]
        # the newer instructions have 64 rows and more
        instruction = limits.matrix_instruction if tile.samples >= 64 else "HMMA"
        if wrong := code.faults(limits, instruction):
            found[str(tile)] = wrong
    return found


@pytest.mark.parametrize(
    ("device", "shape"),
    matrix(product(FAMILIES, SHAPES[:2]), product(FAMILIES, SHAPES[1:2])),
    ids=str,
)
def test_the_first_tile_fits_its_device(device, shape):
    assert faults(device, shape, tiles=slice(1)) == {}


@pytest.mark.full
@pytest.mark.parametrize("device", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("images", [20, 128])
def test_all_tiles_fit_their_devices(device, shape, images):
    shape = (images, *shape[1:])
    assert faults(device, shape) == {}
    assert faults(device, shape, layout=torch.channels_last) == {}


def test_there_are_tiles_for_small_maps_in_16_bits_alone():
    for device in FAMILIES:
        assert plane_tiles((64, 8, 17, 16), (31, 31), BRAIN, device) == ()
        assert plane_tiles((64, 8, 7, 7), (13, 13), torch.float32, device) == ()
        assert {tile.rows for tile in plane_tiles((64, 8, 7, 7), (13, 13), HALF, device)} == {0}
        assert {tile.rows for tile in plane_tiles((64, 8, 9, 9), (13, 13), HALF, device)} == {4}


def test_no_tile_has_many_more_samples_than_images():
    for device in FAMILIES:
        for n in (1, 16, 17, 32, 33, 64, 65, 500):
            for h, w in ((7, 7), (14, 14)):
                tiles = plane_tiles((n, 8, h, w), (13, 13), BRAIN, device)
                assert all(tile.samples < max(17, 2 * n) for tile in tiles), (n, tiles)
                assert len(set(tiles)) == len(tiles)


def test_a_window_holds_its_map_wherever_it_lies():
    for h in range(1, 17):
        for w in range(1, 17):
            assert in_one_window(h, w) == all(i * h * w % 8 + h * w <= 64 for i in range(8))


def test_flat_tiles_are_for_maps_that_fit_a_window_in_both_layouts():
    for h in range(1, 17):
        for w in range(1, 17):
            flat = plane_tiles((64, 8, h, w), (1, 1), BRAIN, "sm_90")[0].rows == 0
            assert flat == all(in_one_window(h, padded_width(w, copied)) for copied in (False, True))


def test_what_they_do_not_take_is_an_error_that_says_so():
    from replknet.kernels.triton_plane import forward

    def refused(match, tile=PlaneTile(), **changes):  # noqa: B008
        facts = {"shape": (2, 8, 7, 7), "kernel": (7, 7), "dtype": HALF, "device": -1, **changes}
        with pytest.raises(ValueError, match=match):
            forward(Work(**facts), tile)

    refused("take float16 and bfloat16, got float32", dtype=torch.float32)
    refused("take contiguous images, got channels_last", channels_last=True)
    refused("maps of up to 16x16 pixels, got 17x7", shape=(2, 8, 17, 7))
    refused("4 rows, or 0 for flat maps, got 2", PlaneTile(rows=2))
    refused("fit a window of 64 elements, got 8x9", PlaneTile(rows=0), shape=(2, 8, 8, 9))


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 6, 7, 7, 13, 13), (70, 24, 13, 9, 5, 17)], ids=str)
def test_they_keep_the_bound_on_a_gpu(shape, dtype, layout):
    from replknet.kernels import triton_run
    from replknet.kernels.triton_plan import family

    n, c, h, w, kh, kw = shape
    x, dy = (torch.randn(n, c, h, w, device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(2))
    weight = (torch.randn(c, 1, kh, kw, device="cuda") / max(kh, kw)).to(dtype)
    bias = torch.randn(c, device="cuda").to(dtype)
    _, dw, db = reference.BACKEND.backward(dy.double(), x.double(), weight.double(), [True] * 3, "direct")
    device = family(torch.cuda.get_device_capability())
    for tile in plane_tiles((n, c, h, w), (kh, kw), dtype, device):
        y = triton_run.run(tile, x, weight, bias, True)
        dx = triton_run.run(tile, dy, weight, None, False, rotated=True)
        found = excess_of({"y": y, "dx": dx, "dw": dw, "db": db}, x, weight, dy, bias=bias, relu=True)
        assert max(found.values()) <= 1, (tile, found)
        assert torch.equal(triton_run.run(tile, x, weight, bias, True), y)
