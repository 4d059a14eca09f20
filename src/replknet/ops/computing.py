"""The ops that compute: their kernels on real and on fake tensors.

One kernel serves all devices: the choice of a backend depends on the device.
"""

import torch
from torch import Tensor

from replknet.kernels import prepared
from replknet.ops.call import accepted, accepted_gradients, check, check_gradient, memory_format
from replknet.ops.schemas import Gradients, library
from replknet.ops.transforms import differentiates_forward


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
    """Raise if a derivative is wanted: autograd passes this op by, and would silently give none."""
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


for _name, _kernel, _fake in (
    ("_depthwise_conv2d", _forward, _fake_forward),
    ("_depthwise_conv2d_backward", _backward, _fake_backward),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"replknet::{_name}", _fake, lib=library)
