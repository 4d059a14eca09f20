"""Recipes for detection: the paper's on COCO, and ours on blood cells and drawn shapes.

The paper's configurations count epochs, and images on each GPU. Here everything is in images, so that any number of
GPUs does equal work. The number of GPUs is not published: batches of 16 (FCOS) and 32 (Cascade Mask R-CNN) are our
guess.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from replknet.limits import CHANNELS
from replknet.train.recipe import Recipe, check_at_most, check_not_negative, check_positive, check_share, check_sides

# images of COCO's train2017 with objects; mmdetection trains on these
_COCO = 117_266
# longer and shorter sides of DETR and Sparse R-CNN, pixels, for the images and before random crops
DETR_SCALES = tuple((1333, short) for short in range(480, 801, 32))
DETR_CROP_SCALES = ((1333, 400), (1333, 500), (1333, 600))


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """The fields that detection adds to a recipe.

    Args:
        detector: "fcos", "cascade_rcnn" and "cascade_mask_rcnn" are mmdetection's, whose official weights fit;
            "torchvision_fcos" and "mask_rcnn" are torchvision's. Detectors with "mask" need annotations with
            segmentations.
        malformed: what to do with unusable annotations and images: "error" stops, "skip" leaves them out.
        scales: longer and shorter sides that a training image is fitted into, pixels; one pair is drawn.
        crop_scales: longer and shorter sides for random crops as in DETR, pixels. Half of the training images are first
            fitted into one of these pairs and cropped. Empty: no crops.
        scale: longer and shorter side that an image is fitted into in evaluation, pixels.
        flip: share of the training images that are mirrored.
        distort: whether to distort the colours of training images.
        channels: channels of the pyramid and the heads.
        drops: numbers of training images; after each of them the learning rate falls to a tenth.
        warmup: "linear" raises the learning rate from `warmup_start`; "constant" keeps it there during the warm-up.
        warmup_start: learning rate at the start of the warm-up divided by the peak learning rate.
        backbone_lr: learning rate of the backbone divided by the learning rate of the heads.

    Raises:
        ValueError: a value is out of its range.
    """

    task: ClassVar[str] = "detection"

    detector: Literal["fcos", "torchvision_fcos", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
    malformed: Literal["error", "skip"] = "error"
    scales: tuple[tuple[int, int], ...]
    crop_scales: tuple[tuple[int, int], ...] = ()
    scale: tuple[int, int]
    flip: float = 0.5
    distort: bool = False
    channels: int = 256
    drops: tuple[int, ...] = ()
    warmup: Literal["linear", "constant"] = "linear"
    warmup_start: float = 1e-3
    backbone_lr: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "channels")
        check_at_most(self, CHANNELS, "channels")
        check_sides(self, "scale", "scales", "crop_scales")
        if not self.scales:
            raise ValueError("scales must have one pair of sides at least, got none")
        if any(drop < 1 for drop in self.drops):
            raise ValueError(f"drops must be positive, got {list(self.drops)}")
        check_not_negative(self, "backbone_lr")
        check_share(self, "flip", "warmup_start")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a wide image in evaluation, pixels."""
        return self.scale[1], self.scale[0]

    @property
    def masks(self) -> bool:
        """Whether the detector finds masks."""
        return "mask" in self.detector


def bccd() -> Recipe:
    """replknet_cifar_l with a narrow FCOS on the blood cells of BCCD, from our CIFAR-10 weights, 37 minutes.

    Command: `replknet train bccd --data bccd.zip`. Our recipe, not the paper's. Measured here in bfloat16 with seed 0:
    AP50 80.1 % on the test images; see docs/detection.md.
    """
    return Recipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        # the weights fit any stride of the stem, and with 4 the network is four times faster
        network={"stem_stride": 4},
        normalization="cifar10",
        evaluate_every=5,
        samples=20 * 205,
        warmup_samples=205,
        batch_size=8,
        lr=1e-3,
        clip_grad=10.0,
        workers=0,
        options=DetectionOptions(
            detector="fcos",
            scales=((400, 300), (480, 360), (560, 420)),
            scale=(480, 360),
            distort=True,
            channels=64,
            drops=(15 * 205, 18 * 205),
        ),
    )


def shapes() -> Recipe:
    """replknet_cifar_l with a narrow Cascade Mask R-CNN on drawn shapes, from our CIFAR-10 weights, 18 minutes.

    Command: `python -m replknet.data.shapes DIR`, then `replknet train shapes --data DIR`. Our recipe, not the paper's.
    It only shows that a cascade learns. Measured here in bfloat16 with seed 0: AP 91.7 % of boxes and 86.3 % of masks.
    """
    return Recipe(
        model="replknet_cifar_l",
        weights="replknet_cifar_l",
        network={"stem_stride": 4},
        normalization="cifar10",
        evaluate_every=4,
        samples=8 * 200,
        warmup_samples=100,
        batch_size=4,
        lr=1e-3,
        clip_grad=10.0,
        workers=0,
        options=DetectionOptions(
            detector="cascade_mask_rcnn",
            scales=((160, 120),),
            scale=(160, 120),
            channels=32,
            drops=(6 * 200,),
        ),
    )


def coco_fcos_31b() -> Recipe:
    """RepLKNet-31B from ImageNet-1K with FCOS on COCO, 24 epochs.

    Command: `replknet train coco_fcos_31b --weights FILE --data COCO --devices 8`. Hardware of the paper: 2 images a
    GPU. The paper's AP: 47.0.
    """
    return Recipe(
        model="replknet_31b",
        finetune=True,
        samples=24 * _COCO,
        warmup_samples=500 * 16,
        batch_size=16,
        lr=2e-4,
        drop_path=0.5,
        clip_grad=35.0,
        # else a batch norm sees only the two images of its GPU
        sync_bn=True,
        workers=4,
        options=DetectionOptions(
            detector="fcos",
            # one box of train2017 has no height
            malformed="skip",
            scales=((1333, 640), (1333, 800)),
            scale=(1333, 800),
            drops=(16 * _COCO, 22 * _COCO),
            warmup_start=1 / 3,
            warmup="constant",
        ),
    )


def coco_cascade_31b() -> Recipe:
    """RepLKNet-31B from ImageNet-1K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31b --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the paper:
    1 image a GPU. The paper's AP: 52.2 of boxes, 45.2 of masks.
    """
    return Recipe(
        model="replknet_31b",
        finetune=True,
        samples=36 * _COCO,
        warmup_samples=500 * 32,
        batch_size=32,
        lr=4e-4,
        drop_path=0.6,
        # else a batch norm sees only the one image of its GPU
        sync_bn=True,
        workers=4,
        options=DetectionOptions(
            detector="cascade_mask_rcnn",
            malformed="skip",
            scales=DETR_SCALES,
            crop_scales=DETR_CROP_SCALES,
            scale=(1333, 800),
            drops=(27 * _COCO, 33 * _COCO),
        ),
    )


def coco_cascade_31b_22k() -> Recipe:
    """RepLKNet-31B from ImageNet-22K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31b_22k --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the
    paper: 1 image a GPU. The paper's AP: 53.0 of boxes, 46.0 of masks.
    """
    return coco_cascade_31b().changed(drop_path=0.4)


def coco_cascade_31l() -> Recipe:
    """RepLKNet-31L from ImageNet-22K with Cascade Mask R-CNN on COCO, 36 epochs.

    Command: `replknet train coco_cascade_31l --weights FILE --data COCO --nodes 4 --devices 8`. Hardware of the paper:
    1 image a GPU. The paper's AP: 53.9 of boxes, 46.5 of masks.
    """
    return coco_cascade_31b().changed(model="replknet_31l", drop_path=0.7)


def coco_cascade_xl() -> Recipe:
    """RepLKNet-XL with Cascade Mask R-CNN on COCO, with norms on its features and its own mean and std, 36 epochs.

    Command: `replknet train coco_cascade_xl --weights FILE --data COCO --devices 8`. Hardware of the paper: 4 images a
    GPU. The paper's AP: 55.5 of boxes, 48.0 of masks.
    """
    return coco_cascade_31b().changed(
        model="replknet_xl",
        network={"norm_intermediate_features": True},
        normalization="inception",
        drop_path=0.5,
    )


RECIPES = (
    bccd,
    shapes,
    coco_fcos_31b,
    coco_cascade_31b,
    coco_cascade_31b_22k,
    coco_cascade_31l,
    coco_cascade_xl,
)
