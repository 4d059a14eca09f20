"""The public operator."""

from replknet.ops import computing, derivatives, flops  # noqa: F401  # registers the ops' kernels with torch
from replknet.ops.depthwise import depthwise_conv2d
from replknet.ops.doctor import doctor

__all__ = ["depthwise_conv2d", "doctor"]
