"""What the inference form makes of each kind of module: an open table of rules by type.

`fold` and `rewritten` are `functools.singledispatch` functions. The rules of our own blocks are here. Who defines a
network of other blocks registers theirs beside it, as `tasks/segmentation/inference_form.py` does; a subclass has the
rules of its nearest registered class.
"""

from functools import singledispatch
from typing import TypeVar

import torch
from torch import Tensor, nn

from replknet.deploy.inference_layers import (
    Activation,
    Convolution,
    Depthwise,
    FeedForward,
    Grouped,
    LargeKernelBlock,
    Pointwise,
    Product,
    product_of,
)
from replknet.deploy.winograd import Winograd
from replknet.models.replknet import RepLKNet
from replknet.models.timm_model import Stage, StagedNet
from replknet.nn import ConvFFN, DepthwiseConv2d, RepLKBlock, merge
from replknet.nn.conv_bn import ConvBN, affine

Module = TypeVar("Module", bound=nn.Module)

# from this many channels and pixels on Winograd's method pays for its transforms and for the memory of its matrices
_WINOGRAD_CHANNELS, _WINOGRAD_PIXELS = 64, 2048
_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.GELU: "gelu"}


@singledispatch
def fold(module: nn.Module) -> None:
    """Remove in place what a module needs only in training, and fold the norms that `merge` leaves.

    The module is in eval mode and merged. Modules without a rule stay as they are.

    Args:
        module: decides by its type which rule is used.
    """


@fold.register
def _fold_last_norm(model: StagedNet) -> None:
    """The last norm into the classifier: the mean of a map that is scaled is the scaled mean."""
    scale_and_shift, head = affine(model.norm), model.head
    if scale_and_shift is None or not isinstance(head, nn.Linear) or model.global_pool.pool_type != "avg":
        return
    scale, shift = scale_and_shift
    weight = head.weight.double()
    bias = weight @ shift + (0 if head.bias is None else head.bias.double())
    head.weight.copy_(weight * scale)
    head.bias = nn.Parameter(bias.to(head.weight), requires_grad=False)
    model.norm = nn.Identity()


def folded(model: nn.Module) -> nn.Module:
    """A merged copy in eval mode, without the norms that can be folded and without what only training uses.

    Args:
        model: in any form; it stays as it was.

    Returns:
        A network whose parameters need no gradient.
    """
    network = merge(model).eval().requires_grad_(False)
    for module in network.modules():
        fold(module)
    return network


class _InFloat32(nn.Module):
    """The pooling before a classifier, or the classifier, in float32 on values of a shorter type."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float())
        return y


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another type, in place; classifiers cost next to nothing and stay in float32 if it is shorter.

    Args:
        network: folded.
        dtype: of its parameters and of the images.
    """
    heads = {}
    if dtype.itemsize < 4:
        staged = [module for module in network.modules() if isinstance(module, StagedNet)]
        heads = {module: (module.global_pool, module.head) for module in staged if isinstance(module.head, nn.Linear)}
        for module in heads:
            module.global_pool, module.head = nn.Identity(), nn.Identity()
    network = network.to(dtype)
    for module, (pool, head) in heads.items():
        module.global_pool, module.head = _InFloat32(pool), _InFloat32(head.float())
    return network


class Rewriter:
    """Puts the layers of `inference_layers` and `winograd` into a network, in place, and counts them.

    Args:
        network: folded, in the dtype in which it is to compute; it runs once, which tells how many pixels each
            convolution sees.
        example: images `[N,3,H,W]` in that dtype, channels_last.

    Attributes:
        cache_itemsize: bytes of a number where maps are worked on in parts that fit into the cache, as on a CPU;
            else None.
        products: 1x1 convolutions that became matrix products.
        operator: depthwise convolutions that went to the operator with their ReLU.
        winograd: dense 3x3 convolutions that went to Winograd's method.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self._network, self._on_cpu = network, example.device.type == "cpu"
        self._pixels = _pixels(network, example)
        self.cache_itemsize = example.element_size() if self._on_cpu else None
        self.products = self.operator = self.winograd = 0

    def rewritten(self) -> nn.Module:
        """The network on the new layers."""
        return rewritten(self._network, self)

    def with_new_children(self, module: Module) -> Module:
        """The module itself, after its children were replaced.

        Args:
            module: whose own `forward` stays.
        """
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, rewritten(child, self))
        return module

    def product(self, conv: nn.Conv2d) -> Product:
        """The matrix product that replaces a 1x1 convolution.

        Args:
            conv: of stride 1, without groups.
        """
        self.products += 1
        return product_of(conv, self._pixels.get(conv, 1))

    def convolution(self, conv: nn.Conv2d, after: nn.Module | None) -> nn.Module:
        """The fastest layer for a convolution and the activation after it.

        Args:
            conv: any convolution.
            after: the activation; None for none. One that the layers do not have runs as a step of its own.
        """
        activation: Activation = "none" if after is None else _ACTIVATIONS.get(type(after), "none")
        if isinstance(after, nn.GELU) and after.approximate != "none":
            activation = "none"
        new = self._chosen(conv, activation)
        return new if after is None or activation != "none" else nn.Sequential(new, after)

    def _chosen(self, conv: nn.Conv2d, activation: Activation) -> nn.Module:
        if isinstance(conv, DepthwiseConv2d) and activation == "relu":
            self.operator += 1
            return Depthwise(conv)
        plain = conv.groups == 1 and conv.stride == (1, 1) and conv.padding_mode == "zeros"
        if plain and conv.kernel_size == (1, 1) and conv.padding == (0, 0):
            self.products += 1
            return Pointwise(conv, activation, self._pixels.get(conv, 1))
        many = min(conv.in_channels, conv.out_channels) >= _WINOGRAD_CHANNELS
        many = many and self._pixels.get(conv, 0) >= _WINOGRAD_PIXELS
        small = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1)
        if plain and small and many and self._on_cpu and conv.weight.dtype == torch.float32:
            self.winograd += 1
            return Winograd(conv, activation)
        return Convolution(conv, activation)


def _pixels(network: nn.Module, example: Tensor) -> dict[nn.Module, int]:
    """The pixels of each convolution's output, over all images, as the network runs on the example."""
    found: dict[nn.Module, int] = {}

    def seen(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[conv] = output.shape[0] * output.shape[2] * output.shape[3]

    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(seen) for conv in convs]
    with torch.inference_mode():
        network(example)
    for hook in hooks:
        hook.remove()
    return found


@singledispatch
def rewritten(module: nn.Module, rewriter: Rewriter) -> nn.Module:
    """What takes the place of a folded module; without a rule the module stays, and its children are replaced.

    Args:
        module: decides by its type which rule is used.
        rewriter: makes the layers of a rule, and counts them.

    Returns:
        A module of the same inputs and outputs, or the module itself.
    """
    return rewriter.with_new_children(module)


@rewritten.register
def _large_kernel_block(block: RepLKBlock, rewriter: Rewriter) -> nn.Module:
    if not isinstance(block.prelkb_bn, nn.Identity):
        return rewriter.with_new_children(block)
    conv = block.large_kernel.lkb_reparam
    assert conv is not None
    first = rewriter.product(block.pw1.conv)
    return LargeKernelBlock(first, rewriter.convolution(conv, block.lk_nonlinear), rewriter.product(block.pw2.conv))


@rewritten.register
def _feed_forward(block: ConvFFN, rewriter: Rewriter) -> nn.Module:
    if not isinstance(block.preffn_bn, nn.Identity):
        return rewriter.with_new_children(block)
    first, second = rewriter.product(block.pw1.conv), rewriter.product(block.pw2.conv)
    return FeedForward(first, second, rewriter.cache_itemsize)


@rewritten.register
def _conv_bn(layer: ConvBN, rewriter: Rewriter) -> nn.Module:
    if not isinstance(layer.bn, nn.Identity):
        return rewriter.with_new_children(layer)
    # the third child, if there is one, is the activation
    return rewriter.convolution(layer.conv, layer[2] if len(layer) > 2 else None)


@rewritten.register
def _conv(conv: nn.Conv2d, rewriter: Rewriter) -> nn.Module:
    # a subclass may compute something else
    return rewriter.convolution(conv, None) if type(conv) is nn.Conv2d else conv


@rewritten.register
def _replknet(network: RepLKNet, rewriter: Rewriter) -> nn.Module:
    """On a CPU stem, stages and transitions work on a few images at a time."""
    rewriter.with_new_children(network)
    size = rewriter.cache_itemsize
    if size is None:
        return network
    cfg = network.cfg
    # the first convolution of the stem may halve the sides
    first = 4 if cfg.stem_stride >= 2 else 1
    stem = nn.Sequential(*network.stem)
    # an output sees five rows above and below, and one of the 3x3 convolutions of a transition one
    network.stem = nn.ModuleList([Grouped(stem, cfg.channels[0] * size / first, cfg.stem_stride, margin=8)])
    for i, stage in enumerate(network.stages):
        assert isinstance(stage, Stage)
        wide = max(1.0, cfg.dw_ratio) * cfg.channels[i] * size
        stage.blocks = nn.ModuleList([Grouped(nn.Sequential(*stage.blocks), wide)])
        if isinstance(network.transitions[i], nn.Sequential):
            network.transitions[i] = Grouped(network.transitions[i], cfg.channels[i + 1] * size, 2, margin=2)
    return network
