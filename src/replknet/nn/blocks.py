"""The bricks of RepLKNet: stem, large-kernel block, feed-forward block, transition (paper, section 4.1)."""

import torch
from torch import Tensor, nn

from replknet.nn.conv_bn import ConvBN, Norm
from replknet.nn.reparam import ReparamLargeKernelConv


class DropPath(nn.Module):
    """In training, zero the residual branch of random images, and scale up the branches of the others.

    Args:
        rate: probability that the branch of an image is dropped, from 0 to below 1.

    Input and output: `[N,C,H,W]`, any float dtype; the same tensor in eval mode.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class RepLKBlock(nn.Module):
    """Norm, 1x1, large depthwise kernel and 1x1, beside the identity shortcut (paper, guideline 2).

    Args:
        channels: channels of input and output.
        dw_channels: channels of the large kernel.
        kernel_size: side of the large kernel in pixels, odd.
        small_kernel: side of the parallel small kernel, or None.
        drop_path: rate of dropped residual branches.
        merged: build the large kernel in its merged form.
        norm: builds a norm from the number of channels.

    Input and output: `[N,C,H,W]`, the dtype of the parameters.

    Raises:
        ValueError: the kernel sides do not fit, as in `ReparamLargeKernelConv`.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1 and Figure 4.
    """

    def __init__(
        self,
        channels: int,
        dw_channels: int,
        kernel_size: int,
        small_kernel: int | None = None,
        drop_path: float = 0.0,
        merged: bool = False,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.prelkb_bn: nn.Module = norm(channels)
        self.pw1 = ConvBN(channels, dw_channels, 1, activation=nn.ReLU(), norm=norm)
        self.large_kernel = ReparamLargeKernelConv(dw_channels, kernel_size, small_kernel, merged, norm)
        self.lk_nonlinear = nn.ReLU()
        self.pw2 = ConvBN(dw_channels, channels, 1, norm=norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw1(self.prelkb_bn(x))
        y = self.lk_nonlinear(self.large_kernel(y))
        return x + self.drop_path(self.pw2(y))


class ConvFFN(nn.Module):
    """Norm, 1x1 to `hidden_channels`, GELU and 1x1 back, beside the identity shortcut.

    Args:
        channels: channels of input and output.
        hidden_channels: channels between the two 1x1 convolutions.
        drop_path: rate of dropped residual branches.
        norm: builds a norm from the number of channels.

    Input and output: `[N,C,H,W]`, the dtype of the parameters.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1 and Figure 4.
    """

    def __init__(
        self, channels: int, hidden_channels: int, drop_path: float = 0.0, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.preffn_bn: nn.Module = norm(channels)
        self.pw1 = ConvBN(channels, hidden_channels, 1, norm=norm)
        self.nonlinear = nn.GELU()
        self.pw2 = ConvBN(hidden_channels, channels, 1, norm=norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x)))))


def stem(in_chans: int, channels: int, stride: int = 4, norm: Norm = nn.BatchNorm2d) -> nn.ModuleList:
    """Four convolutions before the first stage, with a ReLU each: 3x3, depthwise 3x3, 1x1, depthwise 3x3.

    Args:
        in_chans: channels of the image.
        channels: channels of the first stage.
        stride: 4 as in the paper, or 2 or 1 for small images. The first convolution halves the image for 4 and 2,
            the last one for 4.
        norm: builds a norm from the number of channels.

    Returns:
        The four layers, to run one after the other: `[N,in_chans,H,W]` to `[N,channels,H/stride,W/stride]`,
        rounded up.

    Raises:
        ValueError: the stride is not 4, 2 or 1.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1; the strides 2 and 1 are ours.
    """
    halvings = {4: (2, 2), 2: (2, 1), 1: (1, 1)}
    if stride not in halvings:
        raise ValueError(f"the stem's stride must be 4, 2 or 1, got {stride}")
    first, last = halvings[stride]
    return nn.ModuleList(
        [
            ConvBN(in_chans, channels, 3, first, activation=nn.ReLU(), norm=norm),
            ConvBN(channels, channels, 3, depthwise=True, activation=nn.ReLU(), norm=norm),
            ConvBN(channels, channels, 1, activation=nn.ReLU(), norm=norm),
            ConvBN(channels, channels, 3, last, depthwise=True, activation=nn.ReLU(), norm=norm),
        ]
    )


def transition(in_channels: int, out_channels: int, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Between two stages: 1x1 to the new channels, then depthwise 3x3 of stride 2, with a ReLU each.

    Args:
        in_channels: channels of the stage before.
        out_channels: channels of the stage after.
        norm: builds a norm from the number of channels.

    Returns:
        A module from `[N,in_channels,H,W]` to `[N,out_channels,H/2,W/2]`, rounded up.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1.
    """
    return nn.Sequential(
        ConvBN(in_channels, out_channels, 1, activation=nn.ReLU(), norm=norm),
        ConvBN(out_channels, out_channels, 3, 2, depthwise=True, activation=nn.ReLU(), norm=norm),
    )
