"""Correct before fast: results against the float64 definition, by a bound that every algorithm keeps.

The error of a Fourier transform is relative to the norms of the channel, c * eps * log2(L) * |x| * |w| for
transforms of L points, not to the single output. A sum of products in float32 keeps this bound as well, since
the sum of |products| is at most |x| * |w|. The tests of the kernels have the sharper bound of direct sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replknet.bench.cases import Case, What
from replknet.kernels import reference

_EPS = torch.finfo(torch.float32).eps
# products that one check of one result may cost; more channels are sampled, the first and the last always
_PRODUCTS = 4e8


@dataclass(frozen=True)
class Truth:
    """What a result must be on some channels, and how far it may be from that."""

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
    """What y, or dx and dw, must be. `share` is the part of the usual effort that may be spent."""
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
    """Of each channel of each image, `[N,C,1,1]`."""
    return x.flatten(2).norm(dim=2)[..., None, None]


def excess(expected: Sequence[Truth], found: Sequence[Tensor]) -> float:
    """The worst of several results."""
    return max(truth.excess(f) for truth, f in zip(expected, found, strict=True))
