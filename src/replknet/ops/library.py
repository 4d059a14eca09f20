"""The operator as torch's dispatcher knows it: schemas, kernels, shapes, gradients of every order, cost.

There are two ops, each with its gradient:

- `replknet::depthwise_conv2d` knows its derivatives. It is the op of compiled graphs and of saved programs.
- `replknet::_depthwise_conv2d` computes, and autograd passes it by. Below autograd it is all there is, so compilers,
  modes, counters, profilers and tensor subclasses see this one.

An eager call goes through `recorded`, a `torch.autograd.Function` around the second op, since a kernel in Python at
autograd's place in the dispatcher costs more than the convolution of a small map. The schemas are fixed: a change would
break saved `.pt2` files.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import register_flop_formula

from replknet.kernels import prepared
from replknet.ops.call import accepted, accepted_gradients, check, check_gradient, memory_format
from replknet.ops.transforms import differentiates_forward, must_be_plain

Gradients = tuple[Tensor, Tensor, Tensor]
MaybeGradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_FORWARD = "(Tensor x, Tensor weight, Tensor? bias, bool relu, str algorithm) -> Tensor"
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, bool[] wanted, str algorithm) -> (Tensor, Tensor, Tensor)"  # dx, dw, db
)
_library = torch.library.Library("replknet", "DEF")
for _prefix in ("", "_"):
    _library.define(f"{_prefix}depthwise_conv2d{_FORWARD}", tags=torch.Tag.pt2_compliant_tag)
    _library.define(f"{_prefix}depthwise_conv2d_backward{_BACKWARD}", tags=torch.Tag.pt2_compliant_tag)

differentiable = torch.ops.replknet.depthwise_conv2d.default
differentiable_backward = torch.ops.replknet.depthwise_conv2d_backward.default
computing = torch.ops.replknet._depthwise_conv2d.default
computing_backward = torch.ops.replknet._depthwise_conv2d_backward.default


# ----- computing: one kernel for all devices, since the backends' choice knows them


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    _refuse_derivatives(x, weight, bias)
    found = accepted(x, weight, bias, algorithm)
    layout = found.layout
    if found.backend is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    y = found.backend.forward(x.contiguous(memory_format=layout), _dense(weight), bias, relu, algorithm)
    return _settled(y, found.strides)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> Gradients:
    _refuse_derivatives(x, weight, dy)
    found = accepted_gradients(dy, x, weight, algorithm)
    layout = found.layout
    if found.backend is None:
        dx, dw, db = _empty_gradients(x, weight, wanted)
        return dx, dw.zero_(), db.zero_()
    to_x, to_weight, to_bias = found.backend.backward(
        dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout), _dense(weight), wanted, algorithm
    )
    _, _, kh, kw = weight.shape
    return (
        x.new_empty(0) if to_x is None else _settled(to_x, found.strides),
        x.new_empty(0) if to_weight is None else _settled(to_weight, (kh * kw, kh * kw, kw, 1)),
        x.new_empty(0) if to_bias is None else to_bias.contiguous(),
    )


def _refuse_derivatives(x: Tensor, weight: Tensor, other: Tensor | None) -> None:
    """What autograd passes by must not be asked for a derivative: it would be none, without a word."""
    recording = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (other is not None and other.requires_grad)
    )
    if recording or differentiates_forward(x, weight, other):
        raise RuntimeError(
            "torch.ops.replknet._depthwise_conv2d has no derivative; call replknet.ops.depthwise_conv2d, or the op "
            "without the underscore"
        )


def _dense(weight: Tensor) -> Tensor:
    found = weight.contiguous()
    if found is not weight:
        prepared.share(found, weight)
    return found


def _settled(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`result` with exactly these strides."""
    if result.stride() == strides:
        return result
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    check(x, weight, bias, algorithm)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> Gradients:
    check(x, weight, None, algorithm)
    check_gradient(dy, x)
    return _empty_gradients(x, weight, wanted)


def _empty_gradients(x: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
    """Uninitialised dx, dw, db; an op cannot return None, so an unwanted one has no elements."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    layouts = (memory_format(x), torch.contiguous_format, torch.contiguous_format)
    dx, dw, db = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout) if want else x.new_empty(0)
        for shape, layout, want in zip(shapes, layouts, wanted, strict=True)
    )
    return dx, dw, db


# ----- derivatives


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
    """The gradients, recorded for autograd where gradients of them are wanted."""
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad or weight.requires_grad):
        return _RecordedGradients.apply(dy, x, weight, wanted, algorithm)
    return computing_backward(dy, x, weight, wanted, algorithm)


class _RecordedGradients(torch.autograd.Function):
    """The gradients with theirs.

    The operator A(x, w) is bilinear, so the derivatives of its adjoints are A and the adjoints again.
    With dx = A'(dy, w), dw = B(dy, x), db = sum(dy) and the cotangents gx, gw, gb:
    for dy: A(gx, w) + A(x, gw) + gb; for x: A'(dy, gw); for w: B(dy, gx).
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


# ----- torch's own convolution, for who knows only that


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "auto") -> Tensor:
    """The same by torch's own convolution, which has rules for exporters, `torch.func` and forward-mode AD."""
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


# ----- registration

for _name, _kernel, _fake in (
    ("_depthwise_conv2d", _forward, _fake_forward),
    ("_depthwise_conv2d_backward", _backward, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"replknet::{_name}", _fake, lib=_library)
_library.impl("depthwise_conv2d", _differentiable, "CompositeImplicitAutograd")
_library.impl("depthwise_conv2d_backward", _differentiable_backward, "CompositeImplicitAutograd")
# the first that a torch.func transform asks, whatever its tensors are
for _prefix in ("", "_"):
    _library.impl(f"{_prefix}depthwise_conv2d", plain, "FuncTorchDynamicLayerFrontMode")
    _library.impl(f"{_prefix}depthwise_conv2d_backward", plain_gradients, "FuncTorchDynamicLayerFrontMode")


@register_flop_formula([torch.ops.replknet.depthwise_conv2d, torch.ops.replknet._depthwise_conv2d])
def _flops(x_shape: list[int], w_shape: list[int], *_: object, **__: object) -> int:
    """Multiplications and additions counted apart, padding included, as torch counts a convolution."""
    n, c, h, w = x_shape
    return 2 * n * c * h * w * w_shape[2] * w_shape[3]


@register_flop_formula([torch.ops.replknet.depthwise_conv2d_backward, torch.ops.replknet._depthwise_conv2d_backward])
def _flops_backward(
    dy_shape: list[int], x_shape: list[int], w_shape: list[int], wanted: list[bool], *_: object, **__: object
) -> int:
    return _flops(x_shape, w_shape) * (wanted[0] + wanted[1])
