"""Recipes for segmentation: the paper's with UperNet, and ours on CamVid.

The paper's configurations count steps on a fixed number of GPUs. Here the length is in samples, so that any number of
GPUs does equal work. Each ADE20K training sees 5.12 million crops: 160,000 steps of 32. Others usually report 160,000
steps of 16 for Swin or ConvNeXt, which is half as many crops; keep that in mind when you compare scores.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from replknet.limits import CHANNELS
from replknet.train.recipe import Recipe, check_at_most, check_not_negative, check_positive, check_share, check_sides

# factor on the size of an image
_LARGEST_RATIO = 64


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions:
    """The fields that segmentation adds to a recipe.

    Args:
        dataset: data set, as a folder or a zip: "ade20k" (ADEChallengeData2016), "cityscapes" (leftImg8bit and
            gtFine), or "masks" (images/{train,val}/, annotations/{train,val}/ and classes.json).
        scale: longer and shorter side that an image is fitted into, pixels; None: the image's own size.
        ratio: smallest and largest random factor on the size of a training image.
        crop: height and width of a training crop, pixels.
        largest_share: share of a crop's labelled pixels that no single class may reach; other crops are drawn again,
            up to ten times. 1 takes any crop.
        channels: channels of UperNet's head.
        auxiliary_channels: channels of the auxiliary head, which only training uses; None: no such head.
        align_corners: whether every interpolation aligns corners.
        window: side of the sliding windows in evaluation, pixels; None: the whole image at once.
        stride: distance from one window to the next, pixels.
        backbone_lr: learning rate of the backbone divided by the learning rate of the heads.

    Raises:
        ValueError: a value is out of its range.
    """

    task: ClassVar[str] = "segmentation"

    dataset: Literal["ade20k", "cityscapes", "masks"]
    scale: tuple[int, int] | None = None
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int]
    largest_share: float = 0.75
    channels: int = 512
    auxiliary_channels: int | None = 256
    align_corners: bool = False
    window: int | None = None
    stride: int | None = None
    backbone_lr: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "channels")
        check_at_most(self, CHANNELS, "channels", "auxiliary_channels")
        check_share(self, "largest_share")
        check_sides(self, "crop", "scale", "window", "stride")
        if self.auxiliary_channels is not None:
            check_positive(self, "auxiliary_channels")
        if self.ratio[1] > _LARGEST_RATIO:
            raise ValueError(f"ratio must be at most {_LARGEST_RATIO}, got {self.ratio}")
        check_not_negative(self, "backbone_lr")
        if min(self.crop) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop and ratio must be positive and ratio ascending, got {self.crop} and {self.ratio}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a crop, pixels."""
        return self.crop


def ade20k_31b_512() -> Recipe:
    """RepLKNet-31B from ImageNet-1K with UperNet on ADE20K, crops of 512.

    Command: `replknet train ade20k_31b_512 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 2 crops each. The paper's mIoU: 49.9 %, with several scales 50.6 %.
    """
    return Recipe(
        model="replknet_31b",
        finetune=True,
        evaluate_every=32,
        samples=5_120_000,
        warmup_samples=400 * 128,
        batch_size=128,
        lr=2e-4,
        drop_path=0.5,
        # else a batch norm sees only the two crops of its GPU
        sync_bn=True,
        workers=4,
        options=SegmentationOptions(
            dataset="ade20k",
            scale=(2048, 512),
            crop=(512, 512),
        ),
    )


def ade20k_31b_640() -> Recipe:
    """RepLKNet-31B from ImageNet-22K with UperNet on ADE20K, crops and windows of 640.

    Command: `replknet train ade20k_31b_640 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 2 crops each. The paper's mIoU: 51.5 %, with several scales 52.3 %.
    """
    return ade20k_31b_512().changed(crop=(640, 640), window=640, stride=426, drop_path=0.3)


def ade20k_31l_640() -> Recipe:
    """RepLKNet-31L from ImageNet-22K with UperNet on ADE20K, like `ade20k_31b_640`.

    Command: `replknet train ade20k_31l_640 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 1 crop each. The paper's mIoU: 52.4 %, with several scales 52.7 %.
    """
    return ade20k_31b_640().changed(model="replknet_31l", batch_size=64, warmup_samples=800 * 64)


def ade20k_xl_640() -> Recipe:
    """RepLKNet-XL with UperNet on ADE20K, with norms on its features and its own mean and std.

    Command: `replknet train ade20k_xl_640 --weights FILE --data ADEChallengeData2016 --nodes 2 --devices 8`. Hardware
    of the paper: 16 A100s with 2 crops each. The official configuration trains with the test's transforms by mistake;
    this recipe trains with the usual ones. The paper's mIoU: 55.2 %, with several scales 56.0 %.
    """
    return ade20k_31b_640().changed(
        model="replknet_xl",
        network={"norm_intermediate_features": True},
        normalization="inception",
        batch_size=32,
        warmup_samples=1500 * 32,
        drop_path=0.5,
    )


def cityscapes_31b_769() -> Recipe:
    """RepLKNet-31B from ImageNet-1K with UperNet on Cityscapes, crops of 769.

    Command: `replknet train cityscapes_31b_769 --weights FILE --data DIR --nodes 4 --devices 8`. Hardware of the paper:
    32 GPUs with 2 crops each, 1.28 million crops. The paper's mIoU: 83.1 %, with several scales 83.5 %.
    """
    return ade20k_31b_512().changed(
        dataset="cityscapes",
        scale=(2049, 1025),
        crop=(769, 769),
        align_corners=True,
        evaluate_every=40,
        samples=1_280_000,
        warmup_samples=400 * 64,
        batch_size=64,
    )


def camvid() -> Recipe:
    """replknet_cifar_l with a narrow UperNet on CamVid, from our CIFAR-10 weights, 35 minutes on two CPU cores.

    Command: `replknet train camvid --data camvid.zip`. Our recipe, not the paper's. Measured here with seed 0: mIoU
    51.23 % on the test frames; see docs/segmentation.md.
    """
    return Recipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        # the weights fit any stride of the stem, and with 4 the network is four times faster
        network={"stem_stride": 4},
        normalization="cifar10",
        samples=7340,
        warmup_samples=367,
        batch_size=8,
        lr=2e-3,
        evaluate_every=2,
        workers=0,
        options=SegmentationOptions(
            dataset="masks",
            ratio=(0.75, 1.5),
            crop=(240, 320),
            channels=64,
            auxiliary_channels=32,
        ),
    )


RECIPES = (ade20k_31b_512, ade20k_31b_640, ade20k_31l_640, ade20k_xl_640, cityscapes_31b_769, camvid)
