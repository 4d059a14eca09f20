"""What our ops cost, for torch's counter of floating-point operations.

The formulas wait for the counter, since importing it imports Triton.
"""

import torch

from replknet.imports import after_import


def _flops(x_shape: list[int], w_shape: list[int], *_: object, **__: object) -> int:
    """Multiplications and additions count separately, padding included, as torch counts a convolution."""
    n, c, h, w = x_shape
    return 2 * n * c * h * w * w_shape[2] * w_shape[3]


def _flops_backward(
    dy_shape: list[int], x_shape: list[int], w_shape: list[int], wanted: list[bool], *_: object, **__: object
) -> int:
    return _flops(x_shape, w_shape) * (wanted[0] + wanted[1])


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.replknet
    register_flop_formula([ops.depthwise_conv2d, ops._depthwise_conv2d])(_flops)
    register_flop_formula([ops.depthwise_conv2d_backward, ops._depthwise_conv2d_backward])(_flops_backward)


after_import("torch.utils.flop_counter", _register)
