"""UperNet's head as it is run for inference: levels are added and joined in place.

Source: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PyramidHead(nn.Module):
    """transformers' UperNetHead on the same layers, with less memory: no level is kept longer than it is used.

    Args:
        head: whose layers are taken; of its own `forward` the part for the last level is called.

    Input: features, the largest first.
    Output: logits `[N,classes,H,W]` of the size of the first.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        # registered, so that its layers are found
        self.head: Any = head

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
