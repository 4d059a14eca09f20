"""Workloads of the depthwise benchmark, by name; they come from real networks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One depthwise layer: images `[N,C,H,W]` and the side of its kernel."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: int

    @property
    def flops(self) -> int:
        """Multiplications and additions counted apart, padding included."""
        n, c, h, w = self.shape
        return 2 * n * c * h * w * self.kernel**2


CASES = (
    Case("31b.stage1", (1, 128, 56, 56), 31),
    Case("31b.stage2", (1, 256, 28, 28), 29),
    Case("31b.stage3", (1, 512, 14, 14), 27),
    Case("31b.stage4", (1, 1024, 7, 7), 13),
    Case("31b.stage3.n8", (8, 512, 14, 14), 27),
    Case("31b.stage4.n8", (8, 1024, 7, 7), 13),
    Case("cifar.stage1.n128", (128, 32, 16, 16), 15),
    Case("small.k5.n32", (32, 64, 16, 16), 5),
    Case("small.k3.n32", (32, 64, 16, 16), 3),
)
