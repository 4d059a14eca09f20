"""Feature pyramids on any backbone with features."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7


class Pyramid(nn.Module):
    """A backbone and a feature pyramid on it, with one or two levels more than the backbone has features.

    Args:
        backbone: a timm model with `features_only=True`. From stride `finest` on, each feature has twice the stride of
            the feature before it.
        finest: stride of the first feature that is used, pixels.
        channels: channels of every level.
        extra: "pool" appends one level: every second value of the last level. Mask R-CNN with finest 4 gets strides 4
            to 64. "convs" appends two levels: convolutions of stride 2 with a ReLU between them. FCOS with finest 8
            gets strides 8 to 128.

    Input: images `[N,3,H,W]`; if 32 divides the sides, a level has side / stride pixels, rounded up.
    Output: the levels, `[N,channels,h,w]` each, finest first.

    Raises:
        ValueError: the backbone has no such features.

    `strides` holds the strides of the levels, pixels. The initial values are mmdetection's: Xavier uniform, biases 0.

    Source: Lin et al. 2017, "Feature Pyramid Networks for Object Detection", arXiv:1612.03144. The extra convolutions
    come from Tian et al. 2019, "FCOS", arXiv:1904.01355.
    """

    def __init__(
        self,
        backbone: nn.Module,
        finest: int = 4,
        channels: int = 256,
        extra: Literal["pool", "convs"] = "pool",
    ) -> None:
        super().__init__()
        info = backbone.feature_info
        all_strides: list[int] = info.reduction()  # type: ignore[operator,union-attr]  # of every such model
        first = all_strides.index(finest) if finest in all_strides else 0
        strides = all_strides[first:]
        if strides != [finest * 2**i for i in range(len(strides))]:
            raise ValueError(
                f"expected a backbone with features of strides {finest}, {2 * finest} and so on, got {all_strides}"
            )
        widths: list[int] = info.channels()[first:]  # type: ignore[operator,union-attr]
        self.backbone = backbone
        self.first = first
        self.out_channels = channels
        self.strides = (*strides, 2 * strides[-1]) + ((4 * strides[-1],) if extra == "convs" else ())
        block = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(channels, channels)
        self.neck = FeaturePyramidNetwork(widths, channels, block)
        for module in self.neck.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)[self.first :]
        named = OrderedDict((str(i), feature) for i, feature in enumerate(features))
        return list(self.neck(named).values())
