"""MobileNetV2 with kernels of any size; the paper tries its guidelines on this network.

Paper: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, table 2.
Ding et al. 2022, arXiv:2203.06717, section 3, use larger kernels, parallel small kernels and dilation, and remove
shortcuts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier, make_divisible
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from replknet.models.timm_model import Stage, StagedNet, changed, linear, on_device
from replknet.nn import DropPath, ReparamLargeKernelConv
from replknet.nn.conv_bn import ConvBN, Norm

# blocks, channels and expansion of each stage, from table 2
_DEPTHS = (1, 2, 3, 4, 3, 3, 1)
_CHANNELS = (16, 24, 32, 64, 96, 160, 320)
_EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


@dataclass(frozen=True, slots=True, kw_only=True)
class MobileNetV2Config:
    """The architecture of a MobileNetV2; tuples have one value for each of the seven stages.

    Args:
        kernels: side of the depthwise kernels, pixels, odd.
        small_kernel: side of a branch parallel to larger kernels, pixels, odd; `merge` folds it away. None: no branch.
        shortcut: whether blocks add their input to an output of equal shape, as in the original.
        dilation: dilation of every depthwise kernel, pixels.
        strides: stride of the first block of each stage, pixels; later blocks have stride 1.
        stem_stride: stride of the first convolution, pixels.
        width: factor on the original's channels; the products are rounded to multiples of 8.

    Raises:
        ValueError: a tuple has not seven values, a side is even, a stride or dilation is below 1, or the width is not
            positive. The text has the values.
    """

    kernels: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3)
    small_kernel: int | None = None
    shortcut: bool = True
    dilation: int = 1
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stem_stride: int = 2
    width: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kernels", "strides"):
            values = tuple(getattr(self, name))
            # a file may give a list; tuples make configurations comparable
            object.__setattr__(self, name, values)
            if len(values) != len(_DEPTHS):
                raise ValueError(f"{name} must have one value for each of the {len(_DEPTHS)} stages, got {values}")
        for side in (*self.kernels, *([] if self.small_kernel is None else [self.small_kernel])):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"kernel sides must be odd, got {side} in {self}")
        if min(*self.strides, self.stem_stride, self.dilation) < 1 or self.width <= 0:
            raise ValueError(f"strides and dilation must be at least 1 and the width positive, got {self}")


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise kernel, 1x1 to fewer, with ReLU6 after the first two.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        expansion: channels of the depthwise kernel divided by `in_channels`; with 1 there is no first 1x1.
        kernel_size: side of the depthwise kernel, pixels, odd.
        small_kernel: side of the parallel branch, pixels, odd, if smaller than `kernel_size`; None: no branch.
        stride: stride of the depthwise kernel, pixels.
        dilation: dilation of the depthwise kernel, pixels.
        shortcut: whether to add the input to an output of equal shape.
        drop_path: rate of dropped residual branches.
        merged: build the depthwise kernel in the merged form.
        norm: builds a norm from the number of channels.

    Input `[N,in_channels,H,W]`, output `[N,out_channels,H/stride,W/stride]`, rounded up.

    Source: Sandler et al. 2018, arXiv:1801.04381, section 3.3 and Figure 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        kernel_size: int,
        small_kernel: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        shortcut: bool = True,
        drop_path: float = 0.0,
        merged: bool = False,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.pw1: nn.Module = nn.Identity()
        if expansion > 1:
            self.pw1 = ConvBN(in_channels, hidden, 1, activation=nn.ReLU6(), norm=norm)
        small = small_kernel if small_kernel is not None and small_kernel < kernel_size else None
        self.large_kernel = ReparamLargeKernelConv(hidden, kernel_size, small, merged, norm, stride, dilation)
        self.nonlinear = nn.ReLU6()
        self.pw2 = ConvBN(hidden, out_channels, 1, norm=norm)
        self.drop_path = DropPath(drop_path)
        self.shortcut = shortcut and stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw2(self.nonlinear(self.large_kernel(self.pw1(x))))
        if self.shortcut:
            return x + self.drop_path(y)
        return y


class MobileNetV2(StagedNet):
    """MobileNetV2 with the interface of a timm model.

    Args:
        cfg: the architecture.
        num_classes: outputs of the classifier; 0 for pooled features.
        in_chans: channels of the image.
        global_pool: timm's name of the pooling; "" for none (with num_classes=0).
        drop_rate: dropout before the classifier.
        drop_path_rate: rate of dropped residual branches in the last block; the rates grow linearly from 0.
        small_kernel_merged: build the depthwise kernels in the form that `merge(fold_bn=False)` gives.
        sync_bn: build nn.SyncBatchNorm, for training on several GPUs.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, float16 or bfloat16.

    Input: `[N,in_chans,H,W]` of any size, in the dtype of the parameters, normalised with the mean and std of
    `pretrained_cfg`.
    Output: logits `[N,num_classes]`, or pooled features `[N,1280]` with num_classes=0.

    Source: Sandler et al. 2018, arXiv:1801.04381, table 2.
    """

    def __init__(
        self,
        cfg: MobileNetV2Config,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        small_kernel_merged: bool = False,
        sync_bn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        norm: Norm = nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d
        channels = [int(make_divisible(c * cfg.width, 8)) for c in _CHANNELS]
        before = int(make_divisible(_STEM_CHANNELS * cfg.width, 8))
        self.cfg = cfg
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = channels[-1]
        # as in the original, a narrow network keeps the full width here
        self.head_hidden_size = int(make_divisible(_HEAD_CHANNELS * max(1.0, cfg.width), 8))
        self.drop_rate = drop_rate

        with on_device(device):
            self.stem = nn.ModuleList([ConvBN(in_chans, before, 3, cfg.stem_stride, activation=nn.ReLU6(), norm=norm)])
            rates = iter(linear(drop_path_rate, sum(_DEPTHS)))
            reduction = cfg.stem_stride
            stages: list[nn.Module] = []
            info = []
            for i, (kernel, stride, depth, out) in enumerate(
                zip(cfg.kernels, cfg.strides, _DEPTHS, channels, strict=True)
            ):
                blocks: list[nn.Module] = []
                for j in range(depth):
                    blocks.append(
                        InvertedResidual(
                            before,
                            out,
                            _EXPANSIONS[i],
                            kernel,
                            cfg.small_kernel,
                            stride if j == 0 else 1,
                            cfg.dilation,
                            cfg.shortcut,
                            next(rates),
                            small_kernel_merged,
                            norm,
                        )
                    )
                    before = out
                stages.append(Stage(blocks, nn.Identity()))
                reduction *= stride
                info.append({"num_chs": out, "reduction": reduction, "module": f"stages.{i}"})
            self.feature_info = info
            self.last_stage = len(info) - 1
            self.stages = nn.ModuleList(stages)
            self.transitions = nn.ModuleList([nn.Identity() for _ in stages])
            self.norm: nn.Module = nn.Identity()
            self.conv_head: nn.Module = ConvBN(before, self.head_hidden_size, 1, activation=nn.ReLU6(), norm=norm)
            self.global_pool, self.head = create_classifier(self.head_hidden_size, num_classes, pool_type=global_pool)
            self.head_drop = nn.Dropout(drop_rate)
        if dtype is not None:
            self.to(dtype=dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from the last stage's map `[N,C,h,w]`, or with `pre_logits` the pooled features before them."""
        x = self.head_drop(self.global_pool(self.conv_head(x)))
        return x if pre_logits else self.head(x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer-decay group of a parameter: 0 for the stem, then one a block, the last for the layers after them.

        Args:
            coarse: one group a stage instead of one a block.

        Returns:
            A function from a parameter's name to its group.
        """
        return partial(_group, coarse=coarse)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the features of these stages do not need; returns the stage numbers, from 0."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.head, nn.Identity):
            self.conv_head = nn.Identity().train(self.training)
        return taken


def _group(name: str, coarse: bool) -> int:
    part, *rest = name.split(".")
    if part == "stem":
        return 0
    if part != "stages":
        return 1 + (len(_DEPTHS) if coarse else sum(_DEPTHS))
    stage = int(rest[0])
    return 1 + (stage if coarse else sum(_DEPTHS[:stage]) + int(rest[2]))


CONFIGS: dict[str, MobileNetV2Config] = {"mobilenetv2_lk": MobileNetV2Config()}

default_cfgs = generate_default_cfgs(
    {
        "mobilenetv2_lk.untrained": {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "num_classes": 1000,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0.conv",
            "classifier": "head",
            "paper_ids": "arXiv:2203.06717",
            "paper_name": "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
            "license": "apache-2.0",
        }
    }
)


@register_model
def mobilenetv2_lk(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of the paper's ablations; no weights were released.

    The fields of `MobileNetV2Config`, such as `kernels` and `small_kernel`, may be given by name.
    """
    if pretrained:
        raise RuntimeError("no weights were released for mobilenetv2_lk; build it with pretrained=False")
    cfg = changed(CONFIGS["mobilenetv2_lk"], kwargs)
    return build_model_with_cfg(
        MobileNetV2,
        "mobilenetv2_lk",
        pretrained,
        model_cfg=cfg,
        feature_cfg={"out_indices": (0, 1, 2, 4, 6), "feature_cls": "getter"},
        **kwargs,
    )
