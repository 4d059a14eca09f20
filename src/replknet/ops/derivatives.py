"""Derivatives of every order, and torch's own convolution for calls that need its rules."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from replknet.ops.call import check, check_gradient
from replknet.ops.schemas import Gradients, computing, computing_backward, library
from replknet.ops.transforms import differentiates_forward, must_be_plain

MaybeGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def recorded(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    """The convolution, recorded for autograd where a gradient is wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Recorded.apply(x, weight, bias, relu, algorithm)
    return computing(x, weight, bias, relu, algorithm)


class _Recorded(torch.autograd.Function):
    """The convolution with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
        y = computing(x, weight, bias, relu, algorithm)
        ctx.save_for_backward(x, weight, y if relu else None)
        ctx.algorithm = algorithm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            dy = dy * (y > 0)
        return *_gradients(dy, x, weight, list(ctx.needs_input_grad[:3]), ctx.algorithm), None, None


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> MaybeGradients:
    run = plain_gradients if must_be_plain(dy, x, weight) else _recorded_gradients
    dx, dw, db = run(dy, x, weight, wanted, algorithm)
    return dx if wanted[0] else None, dw if wanted[1] else None, db if wanted[2] else None


def _recorded_gradients(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> Gradients:
    """The gradients, recorded for autograd where their own gradients are wanted."""
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad or weight.requires_grad):
        return _RecordedGradients.apply(dy, x, weight, wanted, algorithm)
    return computing_backward(dy, x, weight, wanted, algorithm)


class _RecordedGradients(torch.autograd.Function):
    """The gradients with their own gradients.

    The operator A(x, w) is bilinear, so the derivatives of its adjoints are A and the adjoints again.
    Let dx = A'(dy, w), dw = B(dy, x) and db = sum(dy), with the cotangents gx, gw and gb. The gradients are
    A(gx, w) + A(x, gw) + gb for dy, A'(dy, gw) for x, and B(dy, gx) for w.
    """

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> Gradients:
        ctx.save_for_backward(dy, x, weight)
        ctx.wanted, ctx.algorithm = wanted, algorithm
        return computing_backward(dy, x, weight, wanted, algorithm)

    @staticmethod
    def backward(
        ctx: Any, gx: Tensor, gw: Tensor, gb: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        dy, x, weight = ctx.saved_tensors
        want_dy, want_x, want_w = ctx.needs_input_grad[:3]
        has_dx, has_dw, has_db = ctx.wanted
        run = plain if must_be_plain(dy, x, weight, gx, gw, gb) else recorded
        for_dy = for_x = for_w = None
        if want_dy:
            for_dy = torch.zeros_like(dy)
            if has_dx:
                for_dy = for_dy + run(gx, weight, None, False, ctx.algorithm)
            if has_dw:
                for_dy = for_dy + run(x, gw, None, False, ctx.algorithm)
            if has_db:
                for_dy = for_dy + gb[:, None, None]
        if want_x and has_dw:
            for_x = _gradients(dy, x, gw, [True, False, False], ctx.algorithm)[0]
        if want_w and has_dx:
            for_w = _gradients(dy, gx, weight, [False, True, False], ctx.algorithm)[1]
        return for_dy, for_x, for_w, None, None


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "auto") -> Tensor:
    """The operator by torch's own convolution, which has rules for exporters, `torch.func` and forward-mode AD."""
    y = conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])
    return y.relu() if relu else y


def plain_gradients(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "auto") -> Gradients:
    """The gradients by torch's own convolution."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *(dy, x, weight, None, [1, 1], [weight.shape[2] // 2, weight.shape[3] // 2], [1, 1], False, [0, 0], x.shape[1]),
        [wanted[0], wanted[1], False],
    )
    nothing = x.new_empty(0)
    db = dy.sum((0, 2, 3)) if wanted[2] else nothing
    return nothing if dx is None else dx, nothing if dw is None else dw, db


def _differentiable(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    check(x, weight, bias, algorithm)
    run = plain if differentiates_forward(x, weight, bias) else recorded
    return run(x, weight, bias, relu, algorithm)


def _differentiable_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> Gradients:
    check(x, weight, None, algorithm)
    check_gradient(dy, x)
    run = plain_gradients if differentiates_forward(dy, x, weight) else _recorded_gradients
    return run(dy, x, weight, wanted, algorithm)


library.impl("depthwise_conv2d", _differentiable, "CompositeImplicitAutograd")
library.impl("depthwise_conv2d_backward", _differentiable_backward, "CompositeImplicitAutograd")
# a torch.func transform asks this dispatch key first, whatever its tensors are
for _prefix in ("", "_"):
    library.impl(f"{_prefix}depthwise_conv2d", plain, "FuncTorchDynamicLayerFrontMode")
    library.impl(f"{_prefix}depthwise_conv2d_backward", plain_gradients, "FuncTorchDynamicLayerFrontMode")
