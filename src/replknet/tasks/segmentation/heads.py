"""UperNet over any backbone with features: the segmentation networks of the paper.

The heads are transformers', which are mmsegmentation's. What they lack is added: dropout before the classifiers,
the corners of Cityscapes' configuration, and mmsegmentation's initial values.
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
    """A 1x1 convolution that whole channels are dropped before, in training."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, _DROPOUT, self.training))


class _AdaptivePool(nn.AdaptiveAvgPool2d):
    """torch's adaptive average pooling, in exported files as products with matrices of averages.

    torch's own exports the windows of the size that was traced, and files with dynamic sizes then fail or are wrong.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(input)
        side = self.output_size
        assert isinstance(side, int)
        rows, columns = (_averages(side, input.shape[axis], input) for axis in (2, 3))
        # a product with fixed ranks, which a matrix product of dynamic sizes is not
        across = (input[:, :, :, None] * columns).sum(-1)
        return (across[:, :, None] * rows[:, :, None]).sum(3)


def _averages(windows: int, pixels: int, like: Tensor) -> Tensor:
    """The weight of each pixel of a line in each of the windows: `[windows,pixels]`."""
    window = torch.arange(windows, device=like.device)[:, None]
    pixel = torch.arange(pixels, device=like.device)
    # from the rounded down to the rounded up share of the line
    inside = (pixel >= window * pixels // windows) & (pixel < ((window + 1) * pixels + windows - 1) // windows)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


class UperNet(nn.Module):
    """A backbone, UperNet's head on its features, and an auxiliary head for training.

    Args:
        backbone: a timm model with `features_only=True`; its features are four, at strides 4, 8, 16 and 32 as the
            paper has them, or any number from two on.
        num_classes: classes of a pixel.
        channels: of the head: 512 in the paper.
        auxiliary_channels: of the auxiliary head, on the last feature but one: 256 in the paper; None for no such head.
        align_corners: of every interpolation, as the paper's configuration for Cityscapes has it.

    Input: images `[N,3,H,W]`, any size.
    Output: logits `[N,num_classes,H,W]`; with `auxiliary=True` a tuple of those of both heads.

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
            # no backbone is built from it
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
            # transformers keeps its layers twice, as a list and by name
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
    """The same network as it is used: the head that only training has is dropped, in place."""
    model.auxiliary_head = None
    return model


@fold.register
def _drop_auxiliary(model: UperNet) -> None:
    without_auxiliary(model)
