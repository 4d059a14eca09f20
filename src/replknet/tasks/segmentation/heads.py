"""UperNet on any backbone with features: the segmentation networks of the paper.

The heads come from the package transformers, which copies mmsegmentation's. We add what they lack: dropout before the
classifiers, `align_corners` as in Cityscapes' configuration, and mmsegmentation's initial values.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from replknet.deploy.rewrite import fold
from replknet.tasks.segmentation import inference_form  # noqa: F401  # registers the rules of the heads

_DROPOUT = 0.1


class _Classifier(nn.Conv2d):
    """A 1x1 convolution, after dropout of whole channels in training."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, _DROPOUT, self.training))


class _AdaptivePool(nn.AdaptiveAvgPool2d):
    """torch's adaptive average pooling, exported as products with matrices of averages.

    torch's own export fixes the windows to the traced size. A file for dynamic sizes then fails or is wrong.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(input)
        side = self.output_size
        assert isinstance(side, int)
        rows, columns = (_averages(side, input.shape[axis], input) for axis in (2, 3))
        # not as a matrix product: with dynamic sizes its rank is not fixed
        across = (input[:, :, :, None] * columns).sum(-1)
        return (across[:, :, None] * rows[:, :, None]).sum(3)


def _averages(windows: int, pixels: int, like: Tensor) -> Tensor:
    """The weight of each pixel of a line in each window: `[windows,pixels]`."""
    window = torch.arange(windows, device=like.device)[:, None]
    pixel = torch.arange(pixels, device=like.device)
    # a window starts at its share of the line rounded down, and ends at its share rounded up
    inside = (pixel >= window * pixels // windows) & (pixel < ((window + 1) * pixels + windows - 1) // windows)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


class UperNet(nn.Module):
    """A backbone, UperNet's head on its features, and an auxiliary head for training.

    Args:
        backbone: a timm model with `features_only=True` and at least two features. The paper has four, at strides 4,
            8, 16 and 32.
        num_classes: number of classes.
        channels: channels of the head; 512 in the paper.
        auxiliary_channels: channels of the auxiliary head on the last feature but one; 256 in the paper. None: no such
            head.
        align_corners: whether every interpolation aligns corners, as in the paper's configuration for Cityscapes.

    Input: images `[N,3,H,W]`, any size.
    Output: logits `[N,num_classes,H,W]`; with `auxiliary=True` a tuple: the logits of the head and of the auxiliary
    head.

    Source: Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221; Ding et al. 2022,
    arXiv:2203.06717, section 4.3.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 512,
        auxiliary_channels: int | None = 256,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        widths: list[int] = backbone.feature_info.channels()  # type: ignore[operator,union-attr]  # of every such model
        config = UperNetConfig(
            # a required field; no backbone is built from it
            backbone_config={"model_type": "resnet"},
            hidden_size=channels,
            auxiliary_channels=auxiliary_channels or channels,
        )
        config.num_labels = num_classes
        self.backbone = backbone
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.decode_head = UperNetHead(config, widths)
        self.auxiliary_head: UperNetFCNHead | None = None
        if auxiliary_channels is not None:
            self.auxiliary_head = UperNetFCNHead(config, widths, in_index=len(widths) - 2)
        for head in (self.decode_head, self.auxiliary_head):
            if head is None:
                continue
            head.classifier = _Classifier(head.classifier)
            for module in head.modules():
                if isinstance(module, _Classifier):
                    nn.init.normal_(module.weight, std=0.01)
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # it has one
                elif isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for scale, block in zip(config.pool_scales, self.decode_head.psp_modules.blocks, strict=True):
            # transformers keeps each layer twice, in a list and by name
            pool = _AdaptivePool(scale)
            block.layers[0] = pool
            block.add_module("0", pool)
        self.decode_head.align_corners = self.decode_head.psp_modules.align_corners = align_corners

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features = self.backbone(x)
        size = x.shape[-2:]
        logits = self._upsampled(self.decode_head(features), size)
        if not auxiliary:
            return logits
        assert self.auxiliary_head is not None
        return logits, self._upsampled(self.auxiliary_head(features), size)

    def _upsampled(self, logits: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)


def without_auxiliary(model: UperNet) -> UperNet:
    """Remove the auxiliary head, which only training uses, in place.

    Args:
        model: the network.

    Returns:
        `model` itself.
    """
    model.auxiliary_head = None
    return model


@fold.register
def _drop_auxiliary(model: UperNet) -> None:
    without_auxiliary(model)
