"""What the patch kernels have to do, against counts of the design study and by hand."""

import pytest

from replknet.bench.cases import Case
from replknet.bench.gpu_counts import counts
from replknet.kernels.triton_plan import PatchTile


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
