"""The learned depthwise kernels of a network: where their weight lies, and what the small branch added.

The scale of a channel's kernel says little: the norm or convolution before it and the 1x1 convolution after it can
double it and halve it again. So every channel is measured in its own unit and counts alike.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from replknet.nn import ReparamLargeKernelConv
from replknet.nn.conv_bn import ConvBN, folded, weight_and_bias

# of a re-parameterizable convolution: with a small branch, without one, merged; or any other depthwise convolution
Form = Literal["two branches", "one branch", "merged", "convolution"]


@dataclass(frozen=True)
class LayerKernels:
    """The depthwise kernels of a layer, `[C,Kh,Kw]` in float64 on the CPU.

    Args:
        name: of the layer, as in `named_modules`.
        form: what the layer is; the small branch is known where it has "two branches" alone.
        merged: the kernels that the layer applies in eval mode, a norm that belongs to it included.
        large: the large branch's part of them, or None.
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
    """The kernels of every depthwise convolution of a network, branches and their norms folded as `merge` does.

    Args:
        network: ours in any form, or any other; it stays as it was. Of other networks the weights of each
            `nn.Conv2d` with one kernel a channel are taken as they are: norms that follow are not folded, which is
            another scale of a channel, and parallel branches are layers each for itself.
        min_side: smallest larger side of the kernels, pixels.

    Returns:
        One record a layer, in the order of `named_modules`.

    Raises:
        ValueError: there is no such layer; weights that are not finite; or a norm of a branch that keeps no running
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
            raise ValueError(f"{kind} has no depthwise convolution, whose kernels could be looked at")
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
    # in float64, so that merging rounds nothing
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

    Its rings are squares: those up to distance d are the central window of side 2d+1, so that a small kernel is a
    whole number of rings, and none is cut off by the border. Euclidean rings are cut in the corners, and a 3x3
    kernel ends between two of them.

    Args:
        height: of the kernel, pixels.
        width: of the kernel, pixels.

    Returns:
        `[height,width]` in taps, in float64; halves where a side is even, whose centre is between pixels.
    """
    rows, columns = ((torch.arange(side).double() - (side - 1) / 2).abs() for side in (height, width))
    return torch.maximum(rows[:, None], columns)


def mean_magnitude(kernels: Tensor, whole: Tensor | None = None) -> Tensor:
    """The mean of |w| over channels, each in its own unit: the mean of |w| over the taps of its kernel.

    A value of 1 is what a kernel with equal magnitudes everywhere has.

    Args:
        kernels: `[C,Kh,Kw]`.
        whole: kernels that give the units, `[C,Kh,Kw]`: for a branch the merged ones; `kernels` by default. Channels
            that are zero in it are left out.

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
        From distance in taps, as in `distances`, to magnitude. With the sizes of the rings as weights the mean is 1,
        where `kernels` give the units.
    """
    magnitudes = mean_magnitude(kernels, whole)
    rings = distances(*magnitudes.shape)
    return {distance: magnitudes[rings == distance].mean().item() for distance in rings.unique().tolist()}


def energy_within(kernels: Tensor) -> dict[int, float]:
    """The share of a kernel's squared norm that lies in its central window, as the mean over channels.

    Args:
        kernels: `[C,Kh,Kw]`. Channels that are zero are left out.

    Returns:
        From side of the window in taps, 1, 3, 5, ... up to the larger side of the kernel (2, 4, ... where it is
        even), to a share from 0 to 1; 0 where every channel is zero.
    """
    squares = kernels.square()
    # the mean of squares in units of their own mean, over the number of taps
    shares = mean_magnitude(squares) / squares[0].numel()
    rings = distances(*shares.shape)
    return {int(2 * distance + 1): shares[rings <= distance].sum().item() for distance in rings.unique().tolist()}


def branch_agreement(layer: LayerKernels) -> float | None:
    """The cosine between both branches' parts where the small one has its taps: the median over channels.

    Args:
        layer: as from `layer_kernels`.

    Returns:
        1 where the branches add up, -1 where they cancel; None where there is no small branch, it is no longer known,
        or a part is zero in every channel.
    """
    if layer.small is None or layer.large is None or layer.small_side is None:
        return None
    window = distances(*layer.sides) <= (layer.small_side - 1) / 2
    small, large = ((part * window).flatten(1) for part in (layer.small, layer.large))
    norms = small.norm(dim=1) * large.norm(dim=1)
    alive = norms > 0
    return ((small * large).sum(1)[alive] / norms[alive]).quantile(0.5).item() if alive.any() else None


def small_share(layer: LayerKernels, within: int | None = None) -> float | None:
    """The norm of the small branch's part relative to that of the merged kernel: the median over channels.

    The branches may cancel, so that it may be more than 1, and without a bound in a channel: hence the median.

    Args:
        layer: as from `layer_kernels`.
        within: side in taps of the central window in which the norms are taken; None for the whole kernel.

    Returns:
        The ratio; None where there is no small branch, it is no longer known, or every channel is zero.
    """
    if layer.small is None:
        return None
    window = distances(*layer.sides) <= (max(layer.sides) if within is None else (within - 1) / 2)
    small, merged = ((part * window).flatten(1).norm(dim=1) for part in (layer.small, layer.merged))
    alive = merged > 0
    return (small[alive] / merged[alive]).quantile(0.5).item() if alive.any() else None
