"""UperNet in its inference form: norms are folded, and levels are added and joined in place.

Importing this module registers its rules. `heads.py` defines the network and imports it.

Source: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.upernet.modeling_upernet import (
    UperNetConvModule,
    UperNetHead,
    UperNetPyramidPoolingBlock,
)

from replknet.deploy.rewrite import Rewriter, fold, rewritten
from replknet.nn.conv_bn import affine, set_weight_and_bias, weight_and_bias


class PyramidHead(nn.Module):
    """transformers' UperNetHead with less memory: a level is freed after its last use.

    Args:
        head: the UperNetHead. Its layers and its `psp_forward` are used.

    Input: features, the largest first.
    Output: logits `[N,classes,H,W]` in the size of the first feature.
    """

    def __init__(self, head: UperNetHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> Tensor:
        head = self.head
        levels = [lateral(one) for lateral, one in zip(head.lateral_convs, features[:-1], strict=True)]
        levels.append(head.psp_forward(features))
        for below, above in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
            below.add_(self._resized(above, below.shape[2:]))
        n, channels, h, w = levels[0].shape
        joined = torch.empty(
            (n, len(levels) * channels, h, w),
            dtype=levels[0].dtype,
            device=levels[0].device,
            memory_format=torch.channels_last,
        )
        convs: list[Callable[[Tensor], Tensor]] = [*head.fpn_convs, nn.Identity()]
        for i, conv in enumerate(convs):
            joined[:, i * channels : (i + 1) * channels] = self._resized(conv(levels.pop(0)), (h, w))
        logits: Tensor = head.classifier(head.fpn_bottleneck(joined))
        return logits

    def _resized(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[2:]) == tuple(size):
            return x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.head.align_corners)


@fold.register
def _fold_norm(module: UperNetConvModule) -> None:
    scale_and_shift = affine(module.batch_norm)
    if scale_and_shift is None:
        return
    scale, shift = scale_and_shift
    weight, bias = weight_and_bias(module.conv)
    set_weight_and_bias(module.conv, weight * scale[:, None, None, None], bias * scale + shift)
    module.batch_norm = nn.Identity()  # type: ignore[assignment]  # declared as the norm that it replaces


@rewritten.register
def _conv_module(module: UperNetConvModule, rewriter: Rewriter) -> nn.Module:
    if not isinstance(module.batch_norm, nn.Identity):
        return rewriter.with_new_children(module)
    return rewriter.convolution(module.conv, module.activation)


@rewritten.register
def _pooling_block(block: UperNetPyramidPoolingBlock, rewriter: Rewriter) -> nn.Module:
    rewriter.with_new_children(block)
    # transformers runs the layers from a plain list, which still holds the old ones
    block.layers = list(block.children())
    return block


@rewritten.register
def _pyramid_head(head: UperNetHead, rewriter: Rewriter) -> nn.Module:
    return PyramidHead(rewriter.with_new_children(head))
