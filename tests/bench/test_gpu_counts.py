"""What the kernels on tensor cores have to do, against counts of the design study and by hand."""

import pytest
import torch

from replknet.bench.cases import Case
from replknet.bench.gpu_counts import counts
from replknet.kernels.triton_plan import DirectTile, PatchTile, PlaneTile, forward_tiles, gradient_tiles


@pytest.mark.parametrize(
    ("shape", "kernel", "redundancy"),
    [  # counted by another program, for tiles of 64 images and one row block
        ((64, 128, 56, 56), 31, 2.01),
        ((64, 256, 28, 28), 29, 1.99),
        ((64, 512, 14, 14), 27, 1.71),
        ((64, 384, 16, 16), 31, 1.25),
        ((64, 384, 32, 32), 31, 1.62),
        ((64, 384, 64, 64), 31, 1.72),
        ((64, 384, 64, 64), 13, 3.3),
    ],
)
def test_the_redundancy_of_patches_is_that_of_the_study(shape, kernel, redundancy):
    assert counts(Case("", shape, kernel), PatchTile()).redundancy == pytest.approx(redundancy, rel=0.02)


def test_counts_of_a_map_of_one_patch():
    # 4x16 pixels, a 1x1 kernel: one product of 64 images with one 64x64 matrix, the rest lies outside
    found = counts(Case("", (64, 3, 4, 16), 1), PatchTile())
    assert found.bytes == 2 * 2 * 64 * 3 * 64
    assert found.useful_flops == 2 * 64 * 3 * 64
    assert found.done_flops == 3 * 2 * 64 * 64 * 64
    assert found.floor_us == max(found.memory_us, found.products_us) > 0


def test_few_images_do_not_leave_out_padding():
    case = Case("", (4, 8, 32, 32), 27)
    assert (
        counts(case, PatchTile(by_image=False)).redundancy
        > counts(case, PatchTile(by_image=True, samples=4)).redundancy
    )


def test_column_blocks_that_end_beyond_the_map_are_counted():
    # two patches of 16 columns see blocks from columns -8, 8 and 24: one, two and one product for each of two row
    # blocks of the kernel; the kernel does not know that the map ends at column 17
    found = counts(Case("", (64, 1, 4, 17), 7), PatchTile())
    assert found.done_flops == 2 * 4 * 2 * 64 * 64 * 64


def test_a_map_held_as_patches_takes_one_product_for_each_pair_of_row_blocks():
    found = counts(Case("", (64, 512, 14, 14), 27), PlaneTile())
    assert found.done_flops == 512 * 16 * 2 * 64 * 64 * 64
    assert found.redundancy == pytest.approx(1.71, rel=0.02)
    # a small kernel reaches the row blocks beside an output alone; the last of two batches of images is not full
    found = counts(Case("", (65, 3, 16, 9), 5), PlaneTile())
    assert found.done_flops == 3 * 2 * (4 + 2 * 3) * 2 * 64 * 64 * 64


def test_a_flat_map_takes_one_product():
    found = counts(Case("", (64, 1024, 7, 7), 13), PlaneTile(rows=0))
    assert found.done_flops == 1024 * 2 * 64 * 64 * 64
    assert found.bytes == 2 * 2 * 64 * 1024 * 49
    assert found.strip_bytes == 0


def test_strips_have_no_column_blocks_that_miss_the_map():
    case = Case("", (64, 512, 14, 14), 27)
    # 35 strips of 16 x 16 taps of 2 bytes a channel, one of three column blocks
    for tile in (PatchTile(), PlaneTile()):
        assert counts(case, tile).strip_bytes == 512 * 35 * 512 == 9_175_040
    assert counts(case, DirectTile()).strip_bytes == 0


@pytest.mark.parametrize(
    ("n", "layer", "before", "after"),
    [
        (32, ((128, 56, 56), 31), 2.77, 2.09),
        (32, ((256, 28, 28), 29), 2.89, 2.35),
        (32, ((512, 14, 14), 27), 3.41, 2.13),
        (16, ((128, 56, 56), 31), 3.16, 2.42),
    ],
)
def test_16_to_63_images_have_a_tile_that_leaves_out_padding(n, layer, before, after):
    (c, h, w), kernel = layer
    case = Case("", (n, c, h, w), kernel)
    tiles = forward_tiles(case.shape, (kernel, kernel), torch.bfloat16, False, False, "sm_90")
    patches = [tile for tile in tiles if isinstance(tile, PatchTile)]
    # a candidate: the tile that ships is the one that ran on a device
    assert [round(counts(case, tile).redundancy, 2) for tile in patches[:2]] == [before, after]
    assert patches[1].by_image
    gradients = gradient_tiles(case.shape, (kernel, kernel), torch.bfloat16, False, "sm_90")
    assert [tile.by_image for tile in gradients[:2]] == [False, True]
