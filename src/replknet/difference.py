"""How far apart two tensors are that should be equal."""

from torch import Tensor


def largest_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest absolute difference of two tensors, and the L2 norm of the difference over the L2 norm of `a`."""
    a, b = a.double(), b.double()
    return (a - b).abs().max().item(), ((a - b).norm() / a.norm()).item()
