"""Recipes for classifiers. Each is a function; its docstring says what it trains, its cost and its score."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from replknet.limits import SIDE
from replknet.train.recipe import (
    Recipe,
    check_at_most,
    check_below_one,
    check_not_negative,
    check_share,
    check_sides,
)


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions:
    """The fields that classification adds to a recipe.

    Args:
        dataset: data set: "cifar10", or "folder". A folder has images in {train,val}/<class>/, archives
            {train,val}.tar with such paths, or webdataset shards, which end in .tar, in {train,val}/. The folder
            hfds/NAME is a data set of the Hugging Face hub.
        image_size: side of the images, pixels.
        momentum: momentum of the optimisers that have one, such as sgd and nmuon.
        min_lr: learning rate at the end of the training.
        layer_decay: learning rate of a layer group divided by the learning rate of the next group; None: all equal.
        label_smoothing: probability that is spread over all classes.
        mixup: alpha of mixup; 0: no mixup.
        cutmix: alpha of CutMix; 0: no CutMix.
        mixup_prob: share of the batches that mixup or CutMix mixes.
        mixup_off_epoch: first epoch without mixup and CutMix; 0: all epochs have them.
        crop_padding: padding around CIFAR-10's images for random crops, pixels; None: random resized crops.
        auto_augment: timm's name of an augmentation, such as rand-m9-mstd0.5-inc1, for images of a folder; None: no
            such augmentation.
        color_jitter: range of brightness, contrast and saturation around 1; for images of a folder, without
            auto_augment.
        random_erasing: probability that a rectangle of an image is erased.
        ema_decay: decay of the running average of the weights. The average is kept and scored; the current weights
            get a score of their own. None: no average.
        precise_bn: number of training batches that give batch norms fresh statistics before each epoch is scored and
            kept; 0: running averages. Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576.
        unreadable_images: number of unreadable images that are named and skipped, in a folder or archive; one more is
            an error.

    Raises:
        ValueError: a value is out of its range.
    """

    task: ClassVar[str] = "classification"

    dataset: Literal["cifar10", "folder"]
    image_size: int = 224
    momentum: float = 0.9
    min_lr: float = 1e-6
    layer_decay: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_off_epoch: int = 0
    crop_padding: int | None = None
    auto_augment: str | None = None
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    ema_decay: float | None = None
    precise_bn: int = 0
    unreadable_images: int = 10

    def __post_init__(self) -> None:
        check_sides(self, "image_size")
        check_at_most(self, SIDE, "crop_padding")
        if self.crop_padding is not None:
            check_not_negative(self, "crop_padding")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}; null for equal rates")
        check_not_negative(
            self, "min_lr", "mixup", "cutmix", "mixup_off_epoch", "color_jitter", "precise_bn", "unreadable_images"
        )
        check_share(self, "mixup_prob")
        check_below_one(self, "momentum", "label_smoothing", "random_erasing")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}; null for no average")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, pixels."""
        return self.image_size, self.image_size


def cifar10() -> Recipe:
    """replknet_cifar on CIFAR-10, a few minutes on two CPU cores.

    Command: `replknet train cifar10`. Our recipe, not the paper's. The README has score and time.
    """
    return Recipe(
        model="replknet_cifar",
        epochs=5,
        batch_size=128,
        lr=1e-2,
        warmup_epochs=1,
        # this process makes a whole batch faster than a worker process could send it
        workers=0,
        options=ClassificationOptions(
            dataset="cifar10",
            image_size=32,
            crop_padding=4,
            ema_decay=0.99,
        ),
    )


def cifar10_l() -> Recipe:
    """replknet_cifar_l on CIFAR-10, about an hour on two CPU cores.

    Command: `replknet train cifar10_l`. Our recipe, not the paper's. Measured here with seed 0: top-1 92.75 % in 76
    minutes on two shared cores. The weights come with the package.
    """
    return Recipe(
        model="replknet_cifar_l",
        epochs=40,
        batch_size=256,
        optimizer="nmuon",
        lr=1e-2,
        warmup_epochs=1,
        weight_decay=0.02,
        precision="bf16-mixed",
        workers=0,
        options=ClassificationOptions(
            dataset="cifar10",
            image_size=32,
            momentum=0.95,
            min_lr=0.0,
            crop_padding=4,
            random_erasing=0.25,
            cutmix=1.0,
            mixup_prob=0.25,
            mixup_off_epoch=34,
            ema_decay=0.999,
        ),
    )


def folder() -> Recipe:
    """A small network on your own images, in {train,val}/<class>/ below `--data`.

    Command: `replknet train folder --data DIR`. Our recipe, not the paper's: replknet_nano with timm's usual
    augmentation and a short schedule. Change it to fit your data.
    """
    return Recipe(
        model="replknet_nano",
        epochs=30,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=2,
        drop_path=0.1,
        workers=2,
        options=ClassificationOptions(
            dataset="folder",
            auto_augment="rand-m9-mstd0.5-inc1",
            random_erasing=0.25,
            ema_decay=0.999,
        ),
    )


RECIPES = (cifar10, cifar10_l, folder)
