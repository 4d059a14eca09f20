"""The public operator."""

from replknet.ops.depthwise import depthwise_conv2d
from replknet.ops.doctor import doctor

__all__ = ["depthwise_conv2d", "doctor"]
