"""The definition of the operator, in float64. Slow on purpose; every other backend is tested against it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from replknet.kernels.backend import Backend, Call


def _shifted(x: Tensor, kh: int, kw: int) -> list[tuple[int, int, Tensor]]:
    """For each tap (i, j), the part of the zero-padded float64 x `[N,C,H,W]` that the tap multiplies."""
    h, w = x.shape[2:]
    padded = pad(x.double(), (kw // 2, kw // 2, kh // 2, kh // 2))
    return [(i, j, padded[:, :, i : i + h, j : j + w]) for i in range(kh) for j in range(kw)]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "direct") -> Tensor:
    """y[n,c,h,w] = sum over i,j of x[n,c,h+i-Kh//2,w+j-Kw//2] * weight[c,0,i,j], plus bias[c]."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for i, j, part in _shifted(x, *weight.shape[2:]):
        y += part * weight[:, 0, i, j, None, None].double()
    if bias is not None:
        y += bias[:, None, None].double()
    return (y.relu() if relu else y).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "direct"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The exact adjoints: dx is the operator with the kernel rotated, dw sums x times dy for each tap."""
    dx = forward(dy, weight.flip(2, 3), None, False) if wanted[0] else None
    dw = None
    if wanted[1]:
        dw = torch.empty(weight.shape, dtype=torch.float64, device=x.device)
        for i, j, part in _shifted(x, *weight.shape[2:]):
            dw[:, 0, i, j] = (part * dy.double()).sum((0, 2, 3))
        dw = dw.to(weight.dtype)
    db = dy.double().sum((0, 2, 3)).to(weight.dtype) if wanted[2] else None
    return dx, dw, db


def _refusal(call: Call) -> str | None:
    return "has only the direct algorithm" if call.algorithm == "fft" else None


BACKEND = Backend(name="reference", refusal=_refusal, forward=forward, backward=backward, automatic=False)
