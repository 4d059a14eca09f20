"""What a GPU has to do for a depthwise layer: bytes, useful operations, and operations of our tensor-core kernels.

These are counts, not times. The floors use the rates of an NVIDIA H100, published or measured by others.
"""

from dataclasses import dataclass

from replknet.bench.cases import Case
from replknet.kernels.triton_plan import DirectTile, PatchTile, PlaneTile, Tile, geometry, plane_geometry

# bytes a second from memory
H100_BYTES = 3.0e12
# operations a second: bfloat16 in a large matrix product (cuBLAS); bfloat16 by the instruction for fewer than 64 rows;
# float32 without tensor cores
H100_FLOPS = 790e12
H100_FLOPS_FEW_ROWS = 490e12
H100_FLOPS_SUMS = 67e12


@dataclass(frozen=True)
class Counts:
    """Counts of the forward pass in 16 bits; the gradient for x has equal counts."""

    bytes: int  # the image read once and the result written once
    useful_flops: int  # products that meet the image, and their sums
    done_flops: int  # operations of the kernel, including zeros of Toeplitz matrices and padding
    flops_per_s: float  # the device's rate for `done_flops`
    strip_bytes: int = 0  # Toeplitz matrices, written and then read, mostly in the L2 cache; not in the floors

    @property
    def redundancy(self) -> float:
        return self.done_flops / self.useful_flops

    @property
    def memory_us(self) -> float:
        return 1e6 * self.bytes / H100_BYTES

    @property
    def products_us(self) -> float:
        return 1e6 * self.done_flops / self.flops_per_s

    @property
    def floor_us(self) -> float:
        """Lower bound for the time of a launch of these kernels on an H100."""
        return max(self.memory_us, self.products_us)


def counts(case: Case, tile: Tile) -> Counts:
    """The counts of a layer with a tile; the loops are as in `triton_patch._forward` and `triton_plane`."""
    n, c, h, w = case.shape
    moved = 2 * 2 * n * c * h * w
    if isinstance(tile, DirectTile):
        return Counts(moved, case.useful_flops, case.useful_flops, H100_FLOPS_SUMS)
    kernel = min(case.kernel, 2 * h - 1), min(case.kernel, 2 * w - 1)
    if isinstance(tile, PatchTile):
        products, strips = _patch_products(case, kernel, tile)
    else:
        products, strips = _plane_products(case, kernel, tile)
    patch = 16 * (tile.rows or 4)
    return Counts(
        bytes=moved,
        useful_flops=case.useful_flops,
        done_flops=c * products * 2 * tile.samples * patch * patch,
        flops_per_s=H100_FLOPS if tile.samples >= 64 else H100_FLOPS_FEW_ROWS,
        strip_bytes=2 * c * strips,
    )


def _patch_products(case: Case, kernel: tuple[int, int], tile: PatchTile) -> tuple[int, int]:
    """For one channel: products of a sample matrix with a Toeplitz matrix, and elements of strips."""
    n, _, h, w = case.shape
    g = geometry(h, w, *kernel, tile)
    reach = kernel[0] // 2
    whole = g.tiles == 1 and g.groups == 1
    products = sum(
        1
        for j in range(g.patches + g.blocks - 1)
        if not whole or -16 < g.left + 16 * j < 16 * g.patches
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
    return programs * g.tiles * steps * g.groups * products, g.strip_elements


def _plane_products(case: Case, kernel: tuple[int, int], tile: PlaneTile) -> tuple[int, int]:
    """As `_patch_products`; a flat map is one patch, which needs no strips."""
    n, _, h, w = case.shape
    blocks = -(-n // tile.samples)
    if tile.rows == 0:
        return blocks, 0
    g = plane_geometry(h, w, *kernel)
    farthest = min(g.row_blocks - 1, -(-(kernel[0] // 2) // tile.rows))
    products = sum(g.row_blocks - abs(distance) for distance in range(-farthest, farthest + 1))
    return blocks * products, g.strip_elements
