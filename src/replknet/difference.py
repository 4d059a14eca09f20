"""How far the outputs of two ways of computing the same are apart."""

from torch import Tensor


def largest_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors, and the L2 norm of the difference relative to that of `a`."""
    a, b = a.double(), b.double()
    return (a - b).abs().max().item(), ((a - b).norm() / a.norm()).item()
