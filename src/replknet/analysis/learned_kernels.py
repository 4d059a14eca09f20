"""The learned depthwise kernels of a network: where their weight lies, and what the small branch adds.

The scale of a channel's kernel says little. The norm or convolution before it can double it, and the 1x1 convolution
after it can halve it again. So every channel is measured in its own unit, and all channels count alike.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from replknet.nn import ReparamLargeKernelConv
from replknet.nn.conv_bn import ConvBN, folded, weight_and_bias

# a re-parameterizable convolution with a small branch, without one, or merged; or any other depthwise convolution
Form = Literal["two branches", "one branch", "merged", "convolution"]


@dataclass(frozen=True)
class LayerKernels:
    """The depthwise kernels of a layer, `[C,Kh,Kw]` in float64 on the CPU.

    Args:
        name: name of the layer, as in `named_modules`.
        form: kind of the layer; only with "two branches" is the small branch known.
        merged: the kernels that the layer applies in eval mode, including a norm that belongs to the layer.
        large: the large branch's part of `merged`, or None.
        small: the small branch's part with zeros around it, or None; large + small = merged.
        small_side: side of the small branch's kernels in pixels, or None.
    """

    name: str
    form: Form
    merged: Tensor
    large: Tensor | None = None
    small: Tensor | None = None
    small_side: int | None = None

    @property
    def channels(self) -> int:
        """How many kernels there are."""
        return self.merged.shape[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the kernels in pixels."""
        return self.merged.shape[1], self.merged.shape[2]


def layer_kernels(network: nn.Module, min_side: int = 5) -> list[LayerKernels]:
    """The kernels of every depthwise convolution of a network; branches and their norms are folded as in `merge`.

    Args:
        network: ours in any form, or any other; it stays unchanged. In other networks, each `nn.Conv2d` with one
            kernel a channel is a layer, with its plain weights. Norms after it are not folded, so channels have
            another scale. Parallel branches are separate layers.
        min_side: smallest side to keep, pixels; it is compared with the larger side of a layer's kernels.

    Returns:
        One record a layer, in the order of `named_modules`.

    Raises:
        ValueError: there is no such layer, weights are not finite, or the norm of a branch keeps no running
            statistics.
    """
    found: list[LayerKernels] = []
    largest = 0
    for layer in _layers(network):
        largest = max(largest, *layer.sides)
        if max(layer.sides) < min_side:
            continue
        if not layer.merged.isfinite().all():
            raise ValueError(f"the kernels of {layer.name} must be finite, got NaN or infinity in them")
        found.append(layer)
    if not found:
        kind = type(network).__name__
        if not largest:
            raise ValueError(f"{kind} has no depthwise convolution, so there are no kernels to look at")
        raise ValueError(
            f"{kind} has no depthwise kernel of {min_side} pixels or more, the largest has {largest}; a minimum side "
            f"of {largest} takes it"
        )
    return found


def _layers(network: nn.Module) -> Iterator[LayerKernels]:
    inside: set[nn.Module] = set()
    for name, module in network.named_modules():
        if module in inside:
            continue
        if isinstance(module, ReparamLargeKernelConv):
            inside.update(module.modules())
            yield _reparam(name, module)
        elif isinstance(module, ConvBN) and _is_depthwise(module.conv):
            inside.update(module.modules())
            yield LayerKernels(f"{name}.conv".lstrip("."), "convolution", _kernels(folded(module)[0]))
        elif _is_depthwise(module):
            assert isinstance(module, nn.Conv2d)
            yield LayerKernels(name, "convolution", _kernels(weight_and_bias(module)[0]))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels


def _reparam(name: str, module: ReparamLargeKernelConv) -> LayerKernels:
    # in float64, so that rounding in the merge does not matter
    whole = copy.deepcopy(module).double().fuse().lkb_reparam
    assert whole is not None
    merged = _kernels(whole.weight)
    if module.lkb_origin is None:
        return LayerKernels(name, "merged", merged)
    if module.small_conv is None:
        return LayerKernels(name, "one branch", merged)
    large, small = (_kernels(folded(branch)[0]) for branch in (module.lkb_origin, module.small_conv))
    side = small.shape[-1]
    small = nn.functional.pad(small, [(merged.shape[-1] - side) // 2] * 4)
    return LayerKernels(name, "two branches", merged, large, small, side)


def _kernels(weight: Tensor) -> Tensor:
    """`[C,1,Kh,Kw]` to `[C,Kh,Kw]`, on the CPU."""
    return weight.detach()[:, 0].cpu()


def distances(height: int, width: int) -> Tensor:
    """The Chebyshev distance of each tap of a kernel from its centre: the larger of rows and columns.

    Taps at one distance form a square ring. The rings up to distance d are the central window of side 2d+1. So a small
    kernel is a whole number of rings, and the border cuts none of them. Euclidean rings are cut in the corners, and a
    3x3 kernel ends between two of them.

    Args:
        height: height of the kernel, pixels.
        width: width of the kernel, pixels.

    Returns:
        `[height,width]` in taps, float64. The centre of an even side lies between pixels, so its distances are halves.
    """
    rows, columns = ((torch.arange(side).double() - (side - 1) / 2).abs() for side in (height, width))
    return torch.maximum(rows[:, None], columns)


def mean_magnitude(kernels: Tensor, whole: Tensor | None = None) -> Tensor:
    """The mean of |w| over channels, each in its own unit: the mean of |w| over the taps of its kernel.

    A kernel with equal magnitudes everywhere has the value 1.

    Args:
        kernels: `[C,Kh,Kw]`.
        whole: kernels that give the units, `[C,Kh,Kw]`: the merged ones if `kernels` is a branch. Default: `kernels`.
            Channels that are zero here are left out.

    Returns:
        `[Kh,Kw]`; 0 where every channel of `whole` is zero.
    """
    units = (kernels if whole is None else whole).abs().mean((1, 2), keepdim=True)
    alive = units.flatten() > 0
    return (kernels.abs()[alive] / units[alive]).sum(0) / max(1, int(alive.sum()))


def magnitude_by_distance(kernels: Tensor, whole: Tensor | None = None) -> dict[float, float]:
    """The mean of `mean_magnitude` over the rings of taps at one distance from the centre.

    Args:
        kernels: `[C,Kh,Kw]`.
        whole: kernels that give each channel's unit, as in `mean_magnitude`.

    Returns:
        Distance in taps, as in `distances` -> magnitude. If `kernels` give the units, the mean weighted by the sizes
        of the rings is 1.
    """
    magnitudes = mean_magnitude(kernels, whole)
    rings = distances(*magnitudes.shape)
    return {distance: magnitudes[rings == distance].mean().item() for distance in rings.unique().tolist()}


def energy_within(kernels: Tensor) -> dict[int, float]:
    """The share of a kernel's squared norm that lies in its central window; mean over channels.

    Args:
        kernels: `[C,Kh,Kw]`. Channels that are zero are left out.

    Returns:
        Side of the window in taps -> share from 0 to 1. Sides are 1, 3, 5, ... up to the larger side of the kernel;
        2, 4, ... if that is even. Shares are 0 if every channel is zero.
    """
    squares = kernels.square()
    # the mean of squares in units of their own mean, divided by the number of taps
    shares = mean_magnitude(squares) / squares[0].numel()
    rings = distances(*shares.shape)
    return {int(2 * distance + 1): shares[rings <= distance].sum().item() for distance in rings.unique().tolist()}


def branch_agreement(layer: LayerKernels) -> float | None:
    """The cosine between the parts of both branches, within the taps of the small branch; median over channels.

    Args:
        layer: a record from `layer_kernels`.

    Returns:
        1 if the branches add up, -1 if they cancel. None if there is no small branch, if it is no longer known, or if
        every channel has a part that is zero.
    """
    if layer.small is None or layer.large is None or layer.small_side is None:
        return None
    window = distances(*layer.sides) <= (layer.small_side - 1) / 2
    small, large = ((part * window).flatten(1) for part in (layer.small, layer.large))
    norms = small.norm(dim=1) * large.norm(dim=1)
    alive = norms > 0
    return ((small * large).sum(1)[alive] / norms[alive]).quantile(0.5).item() if alive.any() else None


def small_share(layer: LayerKernels, within: int | None = None) -> float | None:
    """The norm of the small branch's part divided by the norm of the merged kernel; median over channels.

    The branches of a channel may cancel, so its ratio may exceed 1 and has no bound: hence the median.

    Args:
        layer: a record from `layer_kernels`.
        within: side in taps of a central window; norms are taken inside it. None for the whole kernel.

    Returns:
        The ratio. None if there is no small branch, if it is no longer known, or if every channel is zero.
    """
    if layer.small is None:
        return None
    window = distances(*layer.sides) <= (max(layer.sides) if within is None else (within - 1) / 2)
    small, merged = ((part * window).flatten(1).norm(dim=1) for part in (layer.small, layer.merged))
    alive = merged > 0
    return (small[alive] / merged[alive]).quantile(0.5).item() if alive.any() else None
