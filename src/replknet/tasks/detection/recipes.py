"""Trainings of detectors: the paper's on COCO, and ours on blood cells.

The paper's configurations count epochs and images of a GPU; here all is in images, so that fewer GPUs do the same work.
They do not say how many GPUs there were: batches of 16 (FCOS) and 32 (Cascade Mask R-CNN) are our guess.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

# images of COCO's train2017 with objects, which are those that mmdetection trains on
_COCO = 117_266
# of DETR and Sparse R-CNN: longer and shorter side, pixels, and those that they cut from
DETR_SCALES = tuple((1333, short) for short in range(480, 801, 32))
DETR_CROP_SCALES = ((1333, 400), (1333, 500), (1333, 600))


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe:
    """A training of a detector on a backbone.

    Args:
        model: timm's name of the backbone.
        weights: a checkpoint of a classifier that the backbone starts from, of any known key format, or the name of
            weights that come with the package.
        finetune: whether the training makes no sense without `weights`.
        kernels: side of the large kernel of each stage in pixels, odd; None for the network's own.
        network: other options of the backbone by name, as timm.create_model takes them.
        detector: "fcos" with the official head, "torchvision_fcos" with torchvision's, "mask_rcnn" of torchvision,
            "cascade_rcnn", or "cascade_mask_rcnn"; those with a mask need annotations with segmentations.
        malformed: annotations and images of the data set that cannot be used: an "error", or left out ("skip").
        normalization: mean and std of the pixels: "imagenet", "inception" for 0.5 and 0.5, or "cifar10".
        scales: longer and shorter sides into one of which an image is fitted in training, pixels.
        crop_scales: the same for that half of the images of which a part is cut out, as DETR does; none for no crops.
        scale: longer and shorter side into which an image is fitted in evaluation, pixels.
        flip: share of the images that are mirrored in training.
        distort: distort the colours in training.
        channels: of the pyramid and the heads.
        evaluate: score the validation images.
        evaluate_every: epochs from one score to the next.
        samples: images that are trained on; rounded to whole passes over the images with objects.
        drops: images after which the learning rate falls to a tenth.
        warmup_samples: images of warm-up.
        warmup_start: share of the learning rate at its start.
        warmup: it rises from there ("linear"), or stays there for the time ("constant").
        batch_size: images a step, over all devices.
        optimizer: timm's name of it.
        lr: peak learning rate.
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
    detector: Literal["fcos", "torchvision_fcos", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
    malformed: Literal["error", "skip"] = "error"
    normalization: Literal["imagenet", "inception", "cifar10"] = "imagenet"
    scales: tuple[tuple[int, int], ...]
    crop_scales: tuple[tuple[int, int], ...] = ()
    scale: tuple[int, int]
    flip: float = 0.5
    distort: bool = False
    channels: int = 256
    evaluate: bool = True
    evaluate_every: int = 1
    samples: int
    drops: tuple[int, ...] = ()
    warmup_samples: int = 0
    warmup_start: float = 1e-3
    warmup: Literal["linear", "constant"] = "linear"
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
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be from 0 to 1, got {self.flip}")
        if self.warmup_samples >= self.samples:
            raise ValueError(f"warmup_samples must be below the {self.samples} samples, got {self.warmup_samples}")

    @property
    def masks(self) -> bool:
        """Whether the detector finds masks."""
        return "mask" in self.detector

    def epochs_of(self, images: int) -> int:
        """Passes over a training set of so many images with objects."""
        return max(1, round(self.samples / images))


def bccd() -> DetectionRecipe:
    """replknet_cifar_l with a narrow FCOS on the blood cells of BCCD, from our CIFAR-10 weights, in 37 minutes.

    Command: `replknet train bccd --data bccd.zip`. Ours, not the paper's. Measured here in bfloat16: AP50 80.1 % on
    the test images, seed 0; docs/detection.md.
    """
    return DetectionRecipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        # the weights do not depend on it, and the network is four times faster
        network={"stem_stride": 4},
        detector="fcos",
        normalization="cifar10",
        scales=((400, 300), (480, 360), (560, 420)),
        scale=(480, 360),
        distort=True,
        channels=64,
        evaluate_every=5,
        samples=20 * 205,
        drops=(15 * 205, 18 * 205),
        warmup_samples=205,
        batch_size=8,
        lr=1e-3,
        clip_grad=10.0,
        workers=0,
    )


def shapes() -> DetectionRecipe:
    """replknet_cifar_l with a narrow Cascade Mask R-CNN on drawn shapes, from our CIFAR-10 weights, in 18 minutes.

    Command: `python -m replknet.data.shapes DIR`, then `replknet train shapes --data DIR`. Ours, not the paper's: it
    shows that a cascade learns, and measures nothing else. Measured here in bfloat16: AP 91.7 % of boxes and 86.3 % of
    masks, seed 0.
    """
    return DetectionRecipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        network={"stem_stride": 4},
        detector="cascade_mask_rcnn",
        normalization="cifar10",
        scales=((160, 120),),
        scale=(160, 120),
        channels=32,
        evaluate_every=4,
        samples=8 * 200,
        drops=(6 * 200,),
        warmup_samples=100,
        batch_size=4,
        lr=1e-3,
        clip_grad=10.0,
        workers=0,
    )


def coco_fcos_31b() -> DetectionRecipe:
    """RepLKNet-31B of ImageNet-1K with FCOS on COCO, 24 epochs.

    Command: `replknet train coco_fcos_31b --weights FILE --data COCO --devices 8`. Hardware of the paper: 2 images a
    GPU. The paper's AP: 47.0.
    """
    return DetectionRecipe(
        model="replknet_31b",
        finetune=True,
        detector="fcos",
        # one box of train2017 has no height
        malformed="skip",
        scales=((1333, 640), (1333, 800)),
        scale=(1333, 800),
        samples=24 * _COCO,
        drops=(16 * _COCO, 22 * _COCO),
        warmup_samples=500 * 16,
        warmup_start=1 / 3,
        warmup="constant",
        batch_size=16,
        lr=2e-4,
        drop_path=0.5,
        clip_grad=35.0,
        # batch norms see two images a GPU otherwise
        sync_bn=True,
        workers=4,
    )


def coco_cascade_31b() -> DetectionRecipe:
    """RepLKNet-31B of ImageNet-1K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31b --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the paper:
    1 image a GPU. The paper's AP: 52.2 of boxes, 45.2 of masks.
    """
    return DetectionRecipe(
        model="replknet_31b",
        finetune=True,
        detector="cascade_mask_rcnn",
        malformed="skip",
        scales=DETR_SCALES,
        crop_scales=DETR_CROP_SCALES,
        scale=(1333, 800),
        samples=36 * _COCO,
        drops=(27 * _COCO, 33 * _COCO),
        warmup_samples=500 * 32,
        batch_size=32,
        lr=4e-4,
        drop_path=0.6,
        # batch norms see one image a GPU otherwise
        sync_bn=True,
        workers=4,
    )


def coco_cascade_31b_22k() -> DetectionRecipe:
    """RepLKNet-31B of ImageNet-22K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31b_22k --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the
    paper: 1 image a GPU. The paper's AP: 53.0 of boxes, 46.0 of masks.
    """
    return replace(coco_cascade_31b(), drop_path=0.4)


def coco_cascade_31l() -> DetectionRecipe:
    """RepLKNet-31L of ImageNet-22K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31l --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the paper:
    1 image a GPU. The paper's AP: 53.9 of boxes, 46.5 of masks.
    """
    return replace(coco_cascade_31b(), model="replknet_31l", drop_path=0.7)


def coco_cascade_xl() -> DetectionRecipe:
    """RepLKNet-XL with Cascade Mask R-CNN on COCO, with norms on its features and its own mean and std, 36 epochs.

    Command: `replknet train coco_cascade_xl --weights FILE --data COCO --devices 8`. Hardware of the paper: 4 images a
    GPU. The paper's AP: 55.5 of boxes, 48.0 of masks.
    """
    return replace(
        coco_cascade_31b(),
        model="replknet_xl",
        network={"norm_intermediate_features": True},
        normalization="inception",
        drop_path=0.5,
    )
