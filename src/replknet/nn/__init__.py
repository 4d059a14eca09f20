"""Modules that run on the operator, and functions for them: merging, acceleration, and warming up a GPU."""

from replknet.nn.accelerate import accelerate
from replknet.nn.blocks import ConvFFN, DropPath, RepLKBlock, stem, transition
from replknet.nn.depthwise import DepthwiseConv2d, StridedDepthwiseConv2d
from replknet.nn.merge import merge, unfolded_norms
from replknet.nn.reparam import ReparamLargeKernelConv
from replknet.nn.warm import warm

__all__ = [
    "ConvFFN",
    "DepthwiseConv2d",
    "DropPath",
    "RepLKBlock",
    "ReparamLargeKernelConv",
    "StridedDepthwiseConv2d",
    "accelerate",
    "merge",
    "stem",
    "transition",
    "unfolded_norms",
    "warm",
]
