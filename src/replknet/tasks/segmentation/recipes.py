"""Trainings of segmentation networks: the paper's with UperNet, and ours on CamVid.

The paper's configurations count steps of a fixed number of GPUs; here they are samples, so that fewer GPUs do the same
work. Each ADE20K training sees 5.12 million crops: 160,000 steps of 32. The 160,000 steps that others report for
Swin or ConvNeXt are of 16 as a rule, half as many; their scores compare with that in mind.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe:
    """A training of UperNet on a backbone.

    Args:
        model: timm's name of the backbone.
        weights: a checkpoint of a classifier that the backbone starts from, of any known key format, or the name of
            weights that come with the package.
        finetune: whether the training makes no sense without `weights`.
        kernels: side of the large kernel of each stage in pixels, odd; None for the network's own.
        network: other options of the backbone by name, as timm.create_model takes them.
        dataset: "ade20k" (ADEChallengeData2016), "cityscapes" (leftImg8bit and gtFine), or "masks" for
            images/{train,val}/, annotations/{train,val}/ and classes.json, as a folder or a zip.
        normalization: mean and std of the pixels: "imagenet", "inception" for 0.5 and 0.5, or "cifar10".
        scale: longer and shorter side into which an image is fitted, pixels; None for its own size.
        ratio: smallest and largest random factor of that in training.
        crop: height and width of what the network is trained on, pixels.
        largest_share: a crop in which one class has more of the pixels is drawn again; 1 takes any.
        channels: of UperNet's head.
        auxiliary_channels: of the auxiliary head; None for no such head.
        align_corners: of every interpolation.
        window: side of the windows of evaluation, pixels; None for the whole image at once.
        stride: of the windows, pixels.
        evaluate: score the validation images.
        evaluate_every: epochs from one score to the next.
        samples: crops that are trained on; rounded to whole passes over the images.
        warmup_samples: crops of linear warm-up.
        batch_size: crops a step, over all devices.
        optimizer: timm's name of it.
        lr: peak learning rate; it falls linearly to 0.
        backbone_lr: learning rate of the backbone relative to the heads'.
        weight_decay: decay of weights; biases and norms are exempt.
        drop_path: rate of dropped residual branches in the last block.
        sync_bn: batch norms take the statistics of all processes; on GPUs only, as torch has it.
        clip_grad: largest L2 norm of the gradients, or None.
        precision: of Lightning: "32-true", "bf16-mixed" or "16-mixed".
        workers: processes that load images.
        seed: of all random numbers.
    """

    model: str
    weights: str | None = None
    finetune: bool = False
    kernels: tuple[int, ...] | None = None
    network: dict[str, Any] | None = None
    dataset: Literal["ade20k", "cityscapes", "masks"]
    normalization: Literal["imagenet", "inception", "cifar10"] = "imagenet"
    scale: tuple[int, int] | None = None
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int]
    largest_share: float = 0.75
    channels: int = 512
    auxiliary_channels: int | None = 256
    align_corners: bool = False
    window: int | None = None
    stride: int | None = None
    evaluate: bool = True
    evaluate_every: int = 1
    samples: int
    warmup_samples: int = 0
    batch_size: int
    optimizer: str = "adamw"
    lr: float
    backbone_lr: float = 1.0
    weight_decay: float = 0.05
    drop_path: float = 0.0
    sync_bn: bool = False
    clip_grad: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "samples", "batch_size", "lr", "channels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_samples", "weight_decay", "backbone_lr", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        if min(self.crop) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop and ratio must be positive and ratio ascending, got {self.crop} and {self.ratio}")
        if self.warmup_samples >= self.samples:
            raise ValueError(f"warmup_samples must be below the {self.samples} samples, got {self.warmup_samples}")

    def check_at_once(self, crops: int, processes: int) -> None:
        """Refuse what a process cannot train on at once: UperNet's pooled map of one pixel has no variance in one crop.

        Raises:
            ValueError: that is so.
        """
        if crops < 2 and not (self.sync_bn and processes > 1):
            raise ValueError(
                "a process takes one crop at once, and a batch norm needs two of UperNet's pooled map of one pixel: a "
                "larger --batch-size or --device-batch, or --sync-bn true on several GPUs"
            )

    def epochs_of(self, images: int) -> int:
        """Passes over a training set of so many images."""
        return max(1, round(self.samples / images))


def ade20k_31b_512() -> SegmentationRecipe:
    """RepLKNet-31B of ImageNet-1K with UperNet on ADE20K, crops of 512.

    Command: `replknet train ade20k_31b_512 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 2 crops each. The paper's mIoU: 49.9 %, with several scales 50.6 %.
    """
    return SegmentationRecipe(
        model="replknet_31b",
        finetune=True,
        dataset="ade20k",
        scale=(2048, 512),
        crop=(512, 512),
        evaluate_every=32,
        samples=5_120_000,
        warmup_samples=400 * 128,
        batch_size=128,
        lr=2e-4,
        drop_path=0.5,
        # batch norms see two crops a GPU otherwise
        sync_bn=True,
        workers=4,
    )


def ade20k_31b_640() -> SegmentationRecipe:
    """RepLKNet-31B of ImageNet-22K with UperNet on ADE20K, crops and windows of 640.

    Command: `replknet train ade20k_31b_640 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 2 crops each. The paper's mIoU: 51.5 %, with several scales 52.3 %.
    """
    return replace(ade20k_31b_512(), crop=(640, 640), window=640, stride=426, drop_path=0.3)


def ade20k_31l_640() -> SegmentationRecipe:
    """RepLKNet-31L of ImageNet-22K with UperNet on ADE20K, like `ade20k_31b_640`.

    Command: `replknet train ade20k_31l_640 --weights FILE --data ADEChallengeData2016 --nodes 8 --devices 8`. Hardware
    of the paper: 64 GPUs with 1 crop each. The paper's mIoU: 52.4 %, with several scales 52.7 %.
    """
    return replace(ade20k_31b_640(), model="replknet_31l", batch_size=64, warmup_samples=800 * 64)


def ade20k_xl_640() -> SegmentationRecipe:
    """RepLKNet-XL with UperNet on ADE20K, with norms on its features and its own mean and std.

    Command: `replknet train ade20k_xl_640 --weights FILE --data ADEChallengeData2016 --nodes 2 --devices 8`. Hardware
    of the paper: 16 A100s with 2 crops each. Its official configuration trains with the pipeline of the test by
    mistake; this one does not. The paper's mIoU: 55.2 %, with several scales 56.0 %.
    """
    return replace(
        ade20k_31b_640(),
        model="replknet_xl",
        network={"norm_intermediate_features": True},
        normalization="inception",
        batch_size=32,
        warmup_samples=1500 * 32,
        drop_path=0.5,
    )


def cityscapes_31b_769() -> SegmentationRecipe:
    """RepLKNet-31B of ImageNet-1K with UperNet on Cityscapes, crops of 769.

    Command: `replknet train cityscapes_31b_769 --weights FILE --data DIR --nodes 4 --devices 8`. Hardware of the paper:
    32 GPUs with 2 crops each, 1.28 million crops. The paper's mIoU: 83.1 %, with several scales 83.5 %.
    """
    return replace(
        ade20k_31b_512(),
        dataset="cityscapes",
        scale=(2049, 1025),
        crop=(769, 769),
        align_corners=True,
        evaluate_every=40,
        samples=1_280_000,
        warmup_samples=400 * 64,
        batch_size=64,
    )


def camvid() -> SegmentationRecipe:
    """replknet_cifar_l with a narrow UperNet on CamVid, from our CIFAR-10 weights, in 35 minutes of two CPU cores.

    Command: `replknet train camvid --data camvid.zip`. Ours, not the paper's. Measured here: mIoU
    51.23 % on the test frames, seed 0; docs/segmentation.md.
    """
    return SegmentationRecipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        # the weights do not depend on it, and the network is four times faster
        network={"stem_stride": 4},
        dataset="masks",
        normalization="cifar10",
        ratio=(0.75, 1.5),
        crop=(240, 320),
        channels=64,
        auxiliary_channels=32,
        samples=7340,
        warmup_samples=367,
        batch_size=8,
        lr=2e-3,
        evaluate_every=2,
        workers=0,
    )
