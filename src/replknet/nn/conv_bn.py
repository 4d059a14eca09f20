"""A convolution with its batch norm, under the official names, and folding both into one convolution."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from replknet.nn.depthwise import depthwise_conv

# builds a normalisation layer from a number of channels: nn.BatchNorm2d or nn.SyncBatchNorm
Norm = Callable[[int], nn.Module]


class ConvBN(nn.Sequential):
    """A convolution without bias (`conv`), its norm (`bn`) and an activation (`nonlinear`), if any.

    With stride 1 the padding keeps the size. `depthwise_conv` makes the depthwise convolutions.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel in pixels.
        stride: step of the convolution in pixels.
        depthwise: one kernel a channel; `in_channels` and `out_channels` must then be equal.
        activation: the third child, or None.
        norm: builds the norm from the number of channels.
        dilation: dilation of a depthwise convolution, in pixels.
    """

    if TYPE_CHECKING:  # TorchScript would read these at run time
        conv: nn.Conv2d
        bn: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        depthwise: bool = False,
        activation: nn.Module | None = None,
        norm: Norm = nn.BatchNorm2d,
        dilation: int = 1,
    ) -> None:
        if depthwise:
            conv = depthwise_conv(in_channels, kernel_size, stride, dilation)
        else:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        children: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=norm(out_channels))
        if activation is not None:
            children["nonlinear"] = activation
        super().__init__(children)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is any kind of batch norm.

    SyncBatchNorm is no subclass of BatchNorm2d. The frozen norms of torchvision and timm share no class with either, so
    they are found by name.
    """
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, the module's batch norms do not change their running statistics, even in training mode."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # the new statistics count with weight 0, and no batch is counted
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scale and shift, `[C]` in float64, that a batch norm applies in eval mode.

    None if scale and shift are not fixed. Then `norm` is no batch norm, or it keeps no running statistics and
    normalises by the statistics of the batch, even in eval mode.
    """
    if not is_batch_norm(norm):
        return None
    mean, var, weight, bias = (_wide(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or var is None:
        return None
    scale = (var + float(norm.eps)).rsqrt()  # type: ignore[arg-type]  # every batch norm has a number here
    if weight is not None:
        scale = weight * scale
    return scale, (0 if bias is None else bias) - mean * scale


def _wide(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer in float64, or None where the module has None."""
    value = getattr(module, name)
    return value.detach().double() if isinstance(value, Tensor) else None


def weight_and_bias(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight `[O,I,Kh,Kw]` and bias `[O]` in float64; the bias is zeros if there is none."""
    weight = conv.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()


def folded(layer: ConvBN) -> tuple[Tensor, Tensor]:
    """Weight `[O,I,Kh,Kw]` and bias `[O]`, in float64, of the convolution equal to `conv` and `bn` in eval mode.

    Raises:
        ValueError: the norm has no fixed statistics.
    """
    weight, bias = weight_and_bias(layer.conv)
    if isinstance(layer.bn, nn.Identity):
        return weight, bias
    scale_and_shift = affine(layer.bn)
    if scale_and_shift is None:
        raise ValueError(
            f"cannot fold {type(layer.bn).__name__}: it has no running statistics; train with track_running_stats=True"
        )
    scale, shift = scale_and_shift
    return weight * scale[:, None, None, None], bias * scale + shift


@torch.no_grad()
def set_weight_and_bias(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Round float64 values once to the convolution's dtype; add a bias if it has none."""
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(torch.empty_like(conv.weight[:, 0, 0, 0]), conv.weight.requires_grad)
    conv.bias.copy_(bias)
