"""The bound that every kernel keeps: y, dx and dw are sums of products, rounded once to the dtype.

Run on absolute values, the reference gives the sum of |products| of every element; summing them in float32
in any order errs by a small multiple of eps(float32) times that sum.
"""

import torch
from torch import Tensor

from replknet.kernels import Backend, reference

EPS_SUM = torch.finfo(torch.float32).eps


def everything(backend: Backend, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx, dw and db of one backend."""
    y = backend.forward(x, weight, None, False)
    dx, dw, db = backend.backward(dy, x, weight, [True, True, True])
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def excess(backend: Backend, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, float]:
    """For y, dx, dw and db, the largest error as a multiple of what arithmetic allows; at most 1 is right."""
    got = everything(backend, x, weight, dy)
    wide = [t.double() for t in (x, weight, dy)]
    truth = everything(reference.BACKEND, *wide)
    terms = everything(reference.BACKEND, *(t.abs() for t in wide))
    eps = torch.finfo(x.dtype).eps
    # a float64 call sums in float64
    eps_sum = min(eps, EPS_SUM)
    # results below this are subnormal in the dtype, spaced by tiny * eps
    step = torch.finfo(x.dtype).smallest_normal * eps
    found = {}
    for name, t in truth.items():
        error = (got[name].double() - t).abs() / (eps * t.abs() + 4 * eps_sum * terms[name] + step)
        assert not error.isnan().any(), f"{name} has NaN where the reference has none"
        found[name] = error.max().item()
    return found
