"""The bound that every kernel keeps: y, dx and dw are sums of products, rounded once to the dtype.

Run on absolute values, the reference gives the sum of |products| of every element; summing them in float32
in any order errs by a small multiple of eps(float32) times that sum. Through Fourier transforms the error of
an element is relative to the norms of the two signals of its channel instead, and grows with the logarithm
of the transform's length.
"""

from collections import OrderedDict
from hashlib import sha256
from math import log2

import torch
from torch import Tensor

from replknet.kernels import Backend, reference

EPS_SUM = torch.finfo(torch.float32).eps


def everything(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    algorithm: str = "direct",
    bias: Tensor | None = None,
    relu: bool = False,
) -> dict[str, Tensor]:
    """y, dx, dw and db of one backend; bias and ReLU are for y alone."""
    y = backend.forward(x, weight, bias, relu, algorithm)
    dx, dw, db = backend.backward(dy, x, weight, [True, True, True], algorithm)
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def excess(backend: Backend, x: Tensor, weight: Tensor, dy: Tensor, algorithm: str = "direct") -> dict[str, float]:
    """For y, dx, dw and db, the largest error as a multiple of what arithmetic allows; at most 1 is right."""
    return excess_of(everything(backend, x, weight, dy, algorithm), x, weight, dy, algorithm)


def excess_of(
    got: dict[str, Tensor],
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    algorithm: str = "direct",
    bias: Tensor | None = None,
    relu: bool = False,
) -> dict[str, float]:
    """The same for results that are already there; "auto" may have gone either way."""
    truth, terms = _truth_and_terms(x, weight, dy, bias, relu)
    norms = {} if algorithm == "direct" else _norms(*(t.double() for t in (x, weight, dy)))
    if bias is not None and norms:
        norms["y"] = norms["y"] + bias.double().abs()[:, None, None]
    found = {}
    for name, t in truth.items():
        error = (got[name].double() - t).abs() / _allowed(x.dtype, t, terms[name], norms.get(name), algorithm)
        assert not error.isnan().any(), f"{name} has NaN where the reference has none"
        found[name] = error.max().item()
    return found


def rounding(x: Tensor, weight: Tensor, algorithm: str = "direct") -> Tensor:
    """How far each value of y may be from the definition in float64."""
    wide = x.double(), weight.double()
    truth, terms = (reference.forward(*pair, None, False) for pair in (wide, [t.abs() for t in wide]))
    norms = None if algorithm == "direct" else _norms(*wide, wide[0])["y"]
    return _allowed(x.dtype, truth, terms, norms, algorithm)


def _allowed(dtype: torch.dtype, truth: Tensor, terms: Tensor, norms: Tensor | None, algorithm: str) -> Tensor:
    """The largest error of each value, from the sum of its |products| and, through transforms, from the norms."""
    eps = torch.finfo(dtype).eps
    # a float64 call sums in float64
    eps_sum = min(eps, EPS_SUM)
    # and so does the reference, whose error comes on top then
    both_round = 2 if dtype == torch.float64 else 1
    bound = both_round * 4 * eps_sum * terms
    if norms is not None:
        bound = (bound if algorithm == "auto" else 0) + eps_sum * norms
    # results below this are subnormal in the dtype, spaced by tiny * eps
    return eps * truth.abs() + bound + torch.finfo(dtype).smallest_normal * eps


Results = dict[str, Tensor]
_KEPT = 128
_known: OrderedDict[object, tuple[Results, Results]] = OrderedDict()


def _truth_and_terms(x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor | None, relu: bool) -> tuple[Results, Results]:
    """The results in float64, and those of the absolute values; all backends and layouts of a case share them."""
    key = (*map(_content, (x, weight, dy, bias)), relu)
    if key not in _known:
        wide = [t.double() for t in (x, weight, dy)]
        wide_bias = None if bias is None else bias.double()
        truth = everything(reference.BACKEND, *wide, bias=wide_bias, relu=relu)
        terms = everything(reference.BACKEND, *(t.abs() for t in wide), bias=None if bias is None else wide_bias.abs())
        _known[key] = truth, terms
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return _known[key]


def _content(t: Tensor | None) -> object:
    """What two tensors of the same values share, whatever their layout."""
    if t is None:
        return None
    flat = t.detach().cpu().resolve_neg().contiguous().flatten()
    return t.dtype, t.device, t.shape, sha256(flat.view(torch.uint8).numpy()).digest()


def _norms(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """|x| |w|, |dy| |w| and the sum over images of |x| |dy|, by channel, times log2 of the transform's size."""
    nx, ny = x.norm(dim=(2, 3), keepdim=True), dy.norm(dim=(2, 3), keepdim=True)
    nw = weight.norm(dim=(2, 3)).reshape(1, -1, 1, 1)
    size = log2((x.shape[2] + weight.shape[2]) * (x.shape[3] + weight.shape[3]))
    return {"y": size * nx * nw, "dx": size * ny * nw, "dw": size * (nx * ny).sum(0)[:, None]}
