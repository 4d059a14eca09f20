"""What a GPU has to do for a depthwise layer: bytes, useful operations, and those of the patch kernels.

Counts, no times: the floors take the rates of an NVIDIA H100 as they are published or were measured by others.
"""

from dataclasses import dataclass

from replknet.bench.cases import Case
from replknet.kernels.triton_plan import PatchTile, geometry

# bytes a second from memory, and bfloat16 operations a second of a large matrix product (cuBLAS)
H100_BYTES = 3.0e12
H100_FLOPS = 790e12


@dataclass(frozen=True)
class Counts:
    """Of the forward pass in 16 bits; the gradient for x takes the same."""

    bytes: int  # the image read once and the result written once
    useful_flops: int  # products that meet the image, and their sums
    patch_flops: int  # of the patch kernels' matrix products: the zeros of Toeplitz matrices and padding included

    @property
    def redundancy(self) -> float:
        return self.patch_flops / self.useful_flops

    @property
    def memory_us(self) -> float:
        return 1e6 * self.bytes / H100_BYTES

    @property
    def products_us(self) -> float:
        return 1e6 * self.patch_flops / H100_FLOPS

    @property
    def floor_us(self) -> float:
        """No launch of these kernels is faster on that device."""
        return max(self.memory_us, self.products_us)


def counts(case: Case, tile: PatchTile) -> Counts:
    """What a layer takes with a tile; the loops are those of `triton_patch._forward`."""
    n, c, h, w = case.shape
    side = min(case.kernel, 2 * w - 1, 2 * h - 1)
    g = geometry(h, w, side, side, tile)
    reach = side // 2
    whole = g.tiles == 1 and g.groups == 1
    products = sum(
        1
        for j in range(g.patches + g.blocks - 1)
        if not whole or -16 < g.left + 16 * j < w
        for d in range(g.blocks)
        if 0 <= j - d < g.patches
    )
    if tile.by_image:
        steps = 0
        for start in range(0, g.row_blocks * tile.rows, tile.rows * tile.heights):
            first = max(0, (reach - start - (tile.heights - 1) * tile.rows) // tile.rows)
            last = min(g.depth, -(-(h + reach - start) // tile.rows))
            steps += last - first
        programs = -(-n // (tile.samples // tile.heights))
    else:
        steps = g.depth
        programs = -(-n * g.row_blocks // tile.samples)
    patch = 16 * tile.rows
    matrix = 2 * tile.samples * patch * patch
    return Counts(
        bytes=2 * 2 * n * c * h * w,
        useful_flops=case.useful_flops,
        patch_flops=c * programs * g.tiles * steps * g.groups * products * matrix,
    )
