"""Correct before fast: results are compared with the float64 definition, by a bound that every algorithm keeps.

The error of a Fourier transform is relative to the norms of the channel, not to the single output. It is
c * eps * log2(L) * |x| * |w| for transforms of L points. A sum of products in float32 keeps this bound, too, since the
sum of |products| is at most |x| * |w|. The tests of the kernels use the sharper bound of direct sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replknet.bench.cases import Case, What
from replknet.kernels import reference

_EPS = torch.finfo(torch.float32).eps
# products that one check of one result may cost; beyond it channels are sampled, always with the first and the last
_PRODUCTS = 4e8


@dataclass(frozen=True)
class Truth:
    """The right result on some channels, and the error that is allowed."""

    channels: Tensor
    axis: int  # of the channels
    value: Tensor
    allowed: Tensor

    def excess(self, found: Tensor) -> float:
        """The largest error as a multiple of what is allowed; infinite for a wrong shape, an Inf or a NaN."""
        if not found.isfinite().all():
            return math.inf
        part = found.index_select(self.axis, self.channels)
        if part.shape != self.value.shape:
            return math.inf
        return ((part.double() - self.value).abs() / self.allowed).max().item()


def truths(case: Case, what: What, x: Tensor, weight: Tensor, dy: Tensor, share: float = 1.0) -> list[Truth]:
    """The truth of y, or of dx and dw. `share` is the part of the usual products that this check may cost."""
    n, c, h, w = case.shape
    affordable = int(share * _PRODUCTS / (n * h * w * case.kernel**2))
    channels = torch.linspace(0, c - 1, max(2, min(c, affordable))).round().long().unique()
    x, dy, weight = x[:, channels].double(), dy[:, channels].double(), weight[channels].double()
    unit = _EPS * math.log2((h + case.kernel) * (w + case.kernel))
    size = weight.flatten(1).norm(dim=1)[:, None, None]
    if what == "forward":
        y = reference.forward(x, weight, None, False)
        return [Truth(channels, 1, y, unit * _norm(x) * size)]
    dx, dw, _ = reference.backward(dy, x, weight, [True, True, False])
    assert dx is not None
    assert dw is not None
    of_dw = unit * x.transpose(0, 1).flatten(1).norm(dim=1) * dy.transpose(0, 1).flatten(1).norm(dim=1)
    return [Truth(channels, 1, dx, unit * _norm(dy) * size), Truth(channels, 0, dw, of_dw[:, None, None, None])]


def _norm(x: Tensor) -> Tensor:
    """The L2 norm of each channel of each image, `[N,C,1,1]`."""
    return x.flatten(2).norm(dim=2)[..., None, None]


def excess(expected: Sequence[Truth], found: Sequence[Tensor]) -> float:
    """The largest excess of several results."""
    return max(truth.excess(f) for truth, f in zip(expected, found, strict=True))
