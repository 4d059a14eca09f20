"""Trainings of classifiers, each a function: what it trains, what that costs and what it reaches."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from replknet.train.recipe import Recipe, check_below_one, check_not_negative, check_positive, check_share


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions:
    """What a classifier's training adds to a recipe.

    Args:
        dataset: "cifar10", or "folder" for images in {train,val}/<class>/, {train,val}.tar with such paths, or
            webdataset's shards in {train,val}/*.tar, or a data set of the Hugging Face hub, whose folder is hfds/NAME.
        image_size: side of the images in pixels.
        momentum: of optimisers that have one, such as sgd and nmuon.
        min_lr: learning rate at the end.
        layer_decay: factor of the learning rate from one layer group to the one before, or None.
        label_smoothing: probability spread over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mixup_prob: share of the batches that are mixed, if any are.
        mixup_off_epoch: epoch from which none is, 0 for never.
        crop_padding: pixels of padding for random crops of small images; None for random resized crops.
        auto_augment: timm's name of an augmentation, such as rand-m9-mstd0.5-inc1; None for none.
        color_jitter: range of brightness, contrast and saturation around 1 where there is no auto_augment; images of a
            folder only.
        random_erasing: probability of erasing a rectangle.
        ema_decay: decay of the average of the weights, which is then kept and scored, with a score of the network
            itself beside it; None for no average.
        precise_bn: batches on which the statistics of batch norms are computed anew before the network is scored or
            kept at the end of an epoch, 0 for none (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm",
            arXiv:2105.07576).
        unreadable_images: images of a folder or archive that may be damaged; each is named and skipped.

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
        check_positive(self, "image_size")
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
    """replknet_cifar on CIFAR-10 in a few minutes of two CPU cores.

    Command: `replknet train cifar10`. Ours, not the paper's; score and time: README.
    """
    return Recipe(
        model="replknet_cifar",
        epochs=5,
        batch_size=128,
        lr=1e-2,
        warmup_epochs=1,
        # batches are made at once, faster than another process could pass them on
        workers=0,
        options=ClassificationOptions(
            dataset="cifar10",
            image_size=32,
            crop_padding=4,
            ema_decay=0.99,
        ),
    )


def cifar10_l() -> Recipe:
    """replknet_cifar_l on CIFAR-10 in about an hour of two CPU cores.

    Command: `replknet train cifar10_l`. Ours, not the paper's. Measured here: top-1 92.75 % in 76 minutes of two shared
    cores, seed 0. Its weights come with the package.
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

    Command: `replknet train folder --data DIR`. Ours, not the paper's: timm's usual augmentation and a
    short schedule on replknet_nano, to be changed to fit the data.
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
