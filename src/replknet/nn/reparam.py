"""Parallel branches that fold into one convolution: structural re-parameterization (paper, guideline 3)."""

import copy

import torch
from torch import Tensor, nn

from replknet.nn.conv_bn import ConvBN, Norm, folded, set_weight_and_bias
from replknet.nn.depthwise import DepthwiseConv2d, StridedDepthwiseConv2d, depthwise_conv


class ReparamLargeKernelConv(nn.Module):
    """The sum of a large depthwise convolution and an optional small one, each with its norm.

    Children are named as in the released weights: `lkb_origin` and `small_conv` in the training form,
    `lkb_reparam` in the merged form. The children of the other form are None.

    Args:
        channels: channels of input and output.
        kernel_size: side of the large kernel in pixels, odd.
        small_kernel: side of the small kernel, odd and not larger; None for no second branch.
        merged: build the merged form, one convolution with a bias.
        norm: builds the norm of a branch from the number of channels.
        stride: step of both convolutions in pixels.
        dilation: dilation of the large kernel, in pixels; above 1 no small kernel is allowed.

    Input `[N,C,H,W]` and output `[N,C,H/stride,W/stride]`, rounded up, in the dtype of the parameters.

    Raises:
        ValueError: a side is even, the small kernel is the larger one, or the large kernel beside it is dilated.

    Source: Ding et al. 2022, arXiv:2203.06717, section 3, guideline 3.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = None,
        merged: bool = False,
        norm: Norm = nn.BatchNorm2d,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if small_kernel is not None:
            _check_pair(kernel_size, small_kernel)
            if dilation > 1:
                raise ValueError(
                    f"a small kernel cannot merge into a kernel of dilation {dilation}, whose taps are too far apart; "
                    "take small_kernel=None or dilation=1"
                )
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        self.stride = stride
        self.dilation = dilation
        self.lkb_origin: ConvBN | None = None
        self.small_conv: ConvBN | None = None
        self.lkb_reparam: nn.Conv2d | None = None
        if merged:
            self.lkb_reparam = depthwise_conv(channels, kernel_size, stride, dilation, bias=True)
            return
        self.lkb_origin = ConvBN(channels, channels, kernel_size, stride, depthwise=True, norm=norm, dilation=dilation)
        if small_kernel is not None:
            self.small_conv = ConvBN(channels, channels, small_kernel, stride, depthwise=True, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        if self.lkb_reparam is not None:
            return self.lkb_reparam(x)
        assert self.lkb_origin is not None
        y = self.lkb_origin(x)
        if self.small_conv is not None:
            y = y + self.small_conv(x)
        return y

    def fuse(self) -> "ReparamLargeKernelConv":
        """A module in the merged form, equal to this one in eval mode; `self` stays as it was.

        Sums are in float64 and rounded once. `timm.utils.reparameterize_model` calls this method.
        """
        if self.lkb_reparam is not None:
            return copy.deepcopy(self)
        assert self.lkb_origin is not None
        weight, bias = folded(self.lkb_origin)
        if self.small_conv is not None:
            small_weight, small_bias = folded(self.small_conv)
            _check_pair(weight.shape[-1], small_weight.shape[-1])
            margin = (weight.shape[-1] - small_weight.shape[-1]) // 2
            weight = weight + nn.functional.pad(small_weight, [margin] * 4)
            bias = bias + small_bias
        old = self.lkb_origin.conv.weight
        with torch.device("meta"):
            fused = ReparamLargeKernelConv(
                len(bias), self.kernel_size, self.small_kernel, True, stride=self.stride, dilation=self.dilation
            )
        fused = fused.to(old.dtype).to_empty(device=old.device).requires_grad_(old.requires_grad)
        assert fused.lkb_reparam is not None
        set_weight_and_bias(fused.lkb_reparam, weight, bias)
        origin = self.lkb_origin.conv
        for kind in (DepthwiseConv2d, StridedDepthwiseConv2d):
            if isinstance(origin, kind) and isinstance(fused.lkb_reparam, kind):
                fused.lkb_reparam.algorithm = origin.algorithm
        return fused.train(self.training)


def _check_pair(kernel_size: int, small_kernel: int) -> None:
    if small_kernel > kernel_size:
        raise ValueError(
            f"the small kernel must not be larger than the large one, got {small_kernel} and {kernel_size}"
        )
    if (kernel_size - small_kernel) % 2:
        raise ValueError(
            f"kernels of {kernel_size} and {small_kernel} cannot merge: one side is odd and the other even, so "
            "their centres are half a pixel apart; take two odd sides"
        )
