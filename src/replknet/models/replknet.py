"""RepLKNet: the whole architecture, its variants and their registration with timm.

Paper: Ding et al. 2022, "Scaling Up Your Kernels to 31x31", arXiv:2203.06717, section 4.
Official code: DingXiaoH/RepLKNet-pytorch (MIT), read for facts. We use its parameter names and shapes, so its weights
load. Three things differ. SyncBN is an option of each model, not a global. `norm_intermediate_features` adds norms to
the features only. The drop path rate is 0 by default, as everywhere in timm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from replknet.models.checkpoints import checkpoint_filter_fn
from replknet.models.timm_model import Stage, StagedNet, changed, linear, on_device
from replknet.nn import ConvFFN, RepLKBlock, stem, transition
from replknet.nn.conv_bn import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class RepLKNetConfig:
    """The architecture of a RepLKNet; tuples have one value a stage, the stage after the stem first.

    Args:
        kernels: side of the large kernel, pixels, odd.
        depths: number of pairs of a large-kernel block and a feed-forward block.
        channels: channels of the stage.
        small_kernel: side of the parallel branch, pixels, odd; `merge` folds it away. None: no branch.
        dw_ratio: channels of the large kernels divided by the stage's channels.
        ffn_ratio: hidden channels of the feed-forward blocks divided by the stage's channels.
        stem_stride: 4 as in the paper, 2 or 1 for small images.

    Raises:
        ValueError: tuples differ in length, a side is even, the small kernel is larger than a large one, or
            `stem_stride` is not 1, 2 or 4. The text has the values.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1; the defaults are RepLKNet-31B.
    """

    kernels: tuple[int, ...] = (31, 29, 27, 13)
    depths: tuple[int, ...] = (2, 2, 18, 2)
    channels: tuple[int, ...] = (128, 256, 512, 1024)
    small_kernel: int | None = 5
    dw_ratio: float = 1.0
    ffn_ratio: float = 4.0
    stem_stride: int = 4

    def __post_init__(self) -> None:
        # a file may give lists; tuples make configurations comparable
        for name in ("kernels", "depths", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.kernels) == len(self.depths) == len(self.channels) >= 1:
            raise ValueError(
                "kernels, depths and channels must have one value for each stage, got "
                f"{self.kernels}, {self.depths} and {self.channels}"
            )
        for side in (*self.kernels, *([] if self.small_kernel is None else [self.small_kernel])):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"kernel sides must be odd, got {side} in {self}")
        if self.small_kernel is not None and self.small_kernel > min(self.kernels):
            raise ValueError(
                f"small_kernel must not be larger than the kernels {self.kernels}, got {self.small_kernel}; "
                "None builds no small branch"
            )
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {self.stem_stride}")


class RepLKNet(StagedNet):
    """RepLKNet with the interface of a timm model and the official parameter names.

    Args:
        cfg: the architecture.
        num_classes: outputs of the classifier; 0 for pooled features.
        in_chans: channels of the image.
        global_pool: timm's name of the pooling; "" for none (with num_classes=0).
        drop_rate: dropout before the classifier.
        drop_path_rate: rate of dropped residual branches in the last block; the rates grow linearly from 0. A
            large-kernel block and the feed-forward block after it share one rate.
        small_kernel_merged: build the large kernels in the form that `merge(fold_bn=False)` gives.
        norm_intermediate_features: add a norm to each stage's features, as in the XL backbones for segmentation
            and detection. Only `features_only` models and `forward_intermediates` use these norms.
        sync_bn: build nn.SyncBatchNorm, for training on several GPUs.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, float16 or bfloat16.

    Input: `[N,in_chans,H,W]` of any size, in the dtype of the parameters, normalised with the mean and std of
    `pretrained_cfg`.
    Output: logits `[N,num_classes]`, or pooled features `[N,C]` with num_classes=0.

    Source: Ding et al. 2022, arXiv:2203.06717, section 4.1 and Figure 4.
    """

    def __init__(
        self,
        cfg: RepLKNetConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        small_kernel_merged: bool = False,
        norm_intermediate_features: bool = False,
        sync_bn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        norm: Norm = nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d
        self.cfg = cfg
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = cfg.channels[-1]
        self.drop_rate = drop_rate
        self.feature_info = [
            {"num_chs": channels, "reduction": cfg.stem_stride * 2**i, "module": f"stages.{i}"}
            for i, channels in enumerate(cfg.channels)
        ]
        self.last_stage = len(cfg.channels) - 1

        with on_device(device):
            self.stem = stem(in_chans, cfg.channels[0], cfg.stem_stride, norm)
            rates = iter(linear(drop_path_rate, sum(cfg.depths)))
            stages: list[nn.Module] = []
            for kernel, depth, channels in zip(cfg.kernels, cfg.depths, cfg.channels, strict=True):
                blocks: list[nn.Module] = []
                for _ in range(depth):
                    rate = next(rates)
                    dw_channels = int(channels * cfg.dw_ratio)
                    blocks += [
                        RepLKBlock(channels, dw_channels, kernel, cfg.small_kernel, rate, small_kernel_merged, norm),
                        ConvFFN(channels, int(channels * cfg.ffn_ratio), rate, norm),
                    ]
                stages.append(Stage(blocks, norm(channels) if norm_intermediate_features else nn.Identity()))
            self.stages = nn.ModuleList(stages)
            # one after each stage, so that TorchScript can walk both lists together
            pairs = zip(cfg.channels[:-1], cfg.channels[1:], strict=True)
            self.transitions = nn.ModuleList([*(transition(a, b, norm) for a, b in pairs), nn.Identity()])
            self.norm: nn.Module = norm(self.num_features)
            self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=global_pool)
            self.head_drop = nn.Dropout(drop_rate)
        if dtype is not None:
            self.to(dtype=dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer-decay group of a parameter: 0 for the stem, 1 to 12 as in the official code, 13 for norm and head.

        Args:
            coarse: one group a stage instead of the groups 1 to 12.

        Returns:
            A function from a parameter's name to its group.
        """
        return partial(_group, last_stage=len(self.stages) - 1, coarse=coarse)


def _group(name: str, last_stage: int, coarse: bool) -> int:
    part, *rest = name.split(".")
    if part == "stem":
        return 0
    if part not in ("stages", "transitions"):
        return last_stage + 2 if coarse else 13
    stage = int(rest[0])
    if coarse or stage < 2:
        return stage + 1
    if stage > 2:
        return 12
    # the norm of a stage's features and the transition after it belong to the stage's last group
    return min(3 + int(rest[2]) // 4, 11) if rest[1] == "blocks" else 11


B31 = RepLKNetConfig()
CONFIGS: dict[str, RepLKNetConfig] = {
    # the paper's networks
    "replknet_31b": B31,
    "replknet_31l": replace(B31, channels=(192, 384, 768, 1536)),
    "replknet_xl": RepLKNetConfig(
        kernels=(27, 27, 27, 13), channels=(256, 512, 1024, 2048), small_kernel=None, dw_ratio=1.5
    ),
    # the paper's kernel-size study (Table 5); its row 31-29-27-13 is replknet_31b
    "replknet_b_k3": replace(B31, kernels=(3, 3, 3, 3), small_kernel=None),
    "replknet_b_k7": replace(B31, kernels=(7, 7, 7, 7)),
    "replknet_b_k13": replace(B31, kernels=(13, 13, 13, 13)),
    "replknet_b_k25": replace(B31, kernels=(25, 25, 25, 13)),
    # ours, not the paper's
    "replknet_nano": replace(B31, depths=(1, 1, 4, 1), channels=(32, 64, 128, 256)),
    "replknet_cifar": replace(
        B31,
        kernels=(15, 13, 7, 3),
        depths=(1, 1, 1, 1),
        channels=(16, 64, 128, 192),
        small_kernel=3,
        ffn_ratio=2.0,
        stem_stride=2,
    ),
    "replknet_cifar_l": replace(
        B31,
        kernels=(15, 13, 7),
        depths=(1, 2, 2),
        channels=(64, 128, 256),
        small_kernel=3,
        ffn_ratio=2.0,
        stem_stride=2,
    ),
    "replknet_test": replace(B31, kernels=(9, 7, 5, 5), depths=(1, 1, 2, 1), channels=(8, 12, 16, 24)),
}

_MIRROR = "https://download.openmmlab.com/mmclassification/v0/replknet/"
_OFFICIAL = "https://github.com/DingXiaoH/RepLKNet-pytorch"

# released weights without a direct address: tag -> (file, Google Drive id in the official README)
_BY_HAND = {
    "replknet_31b.in22k": ("RepLKNet-31B_ImageNet-22K.pth", "1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z"),
    "replknet_31l.in22k": ("RepLKNet-31L_ImageNet-22K.pth", "16jcPsPwo5rko7ojWS9k_W-svHX-iFknY"),
    "replknet_xl.meg73m": ("RepLKNet-XL_MegData73M_pretrain.pth", "1CBHAEUlCzoHfiAQmMIjZhDMAIyHUmAAj"),
}


def evaluation_crop(size: int, crop_pct: float = 0.875) -> tuple[str, float]:
    """How the official evaluation fits an image into a size: timm's `crop_mode` and `crop_pct`.

    Args:
        size: side of the network's images, pixels. From 384 on an image is warped to the size, and nothing is cropped.
        crop_pct: share of the resized image that the centre crop takes, for smaller sizes.
    """
    return ("squash", 1.0) if size >= 384 else ("center", crop_pct)


def _cfg(mirrored: str = "", size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """timm's facts about weights."""
    crop_mode, crop_pct = evaluation_crop(size)
    return {
        "url": _MIRROR + mirrored if mirrored else "",
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "num_classes": 1000,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head",
        "paper_ids": "arXiv:2203.06717",
        "paper_name": "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
        "origin_url": _OFFICIAL,
        "license": "mit",
        **kwargs,
    }


# XL was trained on images with mean and std 0.5
_xl = partial(_cfg, size=320, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD)

default_cfgs = generate_default_cfgs(
    {
        "replknet_31b.in1k": _cfg("replknet-31B_3rdparty_in1k_20221118-fd08e268.pth"),
        "replknet_31b.in1k_384": _cfg("replknet-31B_3rdparty_in1k-384px_20221118-03a170ce.pth", 384),
        "replknet_31b.in22k_ft_in1k": _cfg("replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth"),
        "replknet_31b.in22k_ft_in1k_384": _cfg("replknet-31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24.pth", 384),
        "replknet_31b.in22k": _cfg(num_classes=21841),
        "replknet_31l.in22k_ft_in1k_384": _cfg("replknet-31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c.pth", 384),
        "replknet_31l.in22k": _cfg(num_classes=21841),
        "replknet_xl.meg73m_ft_in1k": _xl("replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth"),
        "replknet_xl.meg73m": _xl(num_classes=0),
        "replknet_b_k3.untrained": _cfg(),
        "replknet_b_k7.untrained": _cfg(),
        "replknet_b_k13.untrained": _cfg(),
        "replknet_b_k25.untrained": _cfg(),
        "replknet_nano.untrained": _cfg(origin_url="", license="apache-2.0"),
        "replknet_cifar.untrained": _cfg(
            size=32, pool_size=(2, 2), num_classes=10, crop_pct=1.0, origin_url="", license="apache-2.0"
        ),
        "replknet_cifar_l.cifar10": _cfg(
            # it comes with the package: no download
            file=str(Path(__file__).parent / "weights" / "replknet_cifar_l.cifar10.safetensors"),
            size=32,
            pool_size=(4, 4),
            num_classes=10,
            crop_pct=1.0,
            # equal to the values in replknet.data.cifar10; a test compares them
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            origin_url="",
            paper_ids="",
            paper_name="",
            license="apache-2.0",
        ),
        "replknet_test.untrained": _cfg(size=64, num_classes=10, origin_url="", license="apache-2.0"),
    }
)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A registered network; fields of the configuration may be given by name, such as `kernels=(3, 3, 3, 3)`."""
    cfg = changed(CONFIGS[variant], kwargs)
    if kwargs.get("norm_intermediate_features") and not kwargs.get("features_only") and kwargs.get("num_classes") != 0:
        raise ValueError(
            "norm_intermediate_features adds norms that a classifier never uses; "
            "pass features_only=True, or num_classes=0"
        )
    if pretrained:
        _require_weights(variant, kwargs)
    return build_model_with_cfg(
        RepLKNet,
        variant,
        pretrained,
        model_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(cfg.depths))), "feature_cls": "getter"},
        **kwargs,
    )


def _require_weights(variant: str, kwargs: dict[str, Any]) -> None:
    """Raise an error that says where the weights are, if timm cannot fetch them."""
    found = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if found.has_weights:
        return
    name = f"{variant}.{found.tag}" if found.tag else variant
    if name not in _BY_HAND:
        raise RuntimeError(
            f"no weights were released for {name}; build it with pretrained=False, or give your own file: "
            "replknet.load_checkpoint(model, path)"
        )
    file, drive_id = _BY_HAND[name]
    raise RuntimeError(
        f"the weights of {name} have no direct address: download {file} by hand (Google Drive id {drive_id}, "
        f"linked from {_OFFICIAL}), then build with pretrained=False and call replknet.load_checkpoint(model, {file!r})"
    )


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31B: kernels 31, 29, 27, 13; 79.9M parameters in training, 79.5M merged."""
    return _build("replknet_31b", pretrained, **kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31L: as 31B with 1.5 times the channels; 172.7M parameters in training, 172.2M merged."""
    return _build("replknet_31l", pretrained, **kwargs)


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-XL: kernels 27, 27, 27, 13 on 1.5 times a stage's channels, no small branch; 335.4M parameters."""
    return _build("replknet_xl", pretrained, **kwargs)


@register_model
def replknet_b_k3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The 3-3-3-3 row of the paper's kernel-size study; no small branch, since 5x5 is larger than 3x3."""
    return _build("replknet_b_k3", pretrained, **kwargs)


@register_model
def replknet_b_k7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The 7-7-7-7 row of the paper's kernel-size study."""
    return _build("replknet_b_k7", pretrained, **kwargs)


@register_model
def replknet_b_k13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The 13-13-13-13 row of the paper's kernel-size study, "RepLKNet-13" in its receptive-field study."""
    return _build("replknet_b_k13", pretrained, **kwargs)


@register_model
def replknet_b_k25(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The 25-25-25-13 row of the paper's kernel-size study."""
    return _build("replknet_b_k25", pretrained, **kwargs)


@register_model
def replknet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's: 31B's kernels in a network small enough to train on a CPU, for 224-pixel images."""
    return _build("replknet_nano", pretrained, **kwargs)


@register_model
def replknet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's: a stem of stride 2 for 32-pixel images, trained by `replknet demo`."""
    return _build("replknet_cifar", pretrained, **kwargs)


@register_model
def replknet_cifar_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's: for 32-pixel images, with more channels than `replknet_cifar`; 1.17M parameters."""
    return _build("replknet_cifar_l", pretrained, **kwargs)


@register_model
def replknet_test(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's: as small as possible with every kind of layer, for tests."""
    return _build("replknet_test", pretrained, **kwargs)
