"""Trainings of classifiers, each a function: what it trains, what that costs and what it reaches."""

from replknet.train.recipe import Recipe


def cifar10() -> Recipe:
    """replknet_cifar on CIFAR-10 in a few minutes of two CPU cores.

    Command: `replknet train cifar10`. Ours, not the paper's; score and time: README.
    """
    return Recipe(
        model="replknet_cifar",
        dataset="cifar10",
        image_size=32,
        epochs=5,
        batch_size=128,
        lr=1e-2,
        warmup_epochs=1,
        crop_padding=4,
        ema_decay=0.99,
        # batches are made at once, faster than another process could pass them on
        workers=0,
    )


def cifar10_l() -> Recipe:
    """replknet_cifar_l on CIFAR-10 in about an hour of two CPU cores.

    Command: `replknet train cifar10_l`. Ours, not the paper's. Measured here: top-1 92.75 % in 76 minutes of two shared
    cores, seed 0. Its weights come with the package.
    """
    return Recipe(
        model="replknet_cifar_l",
        dataset="cifar10",
        image_size=32,
        epochs=40,
        batch_size=256,
        optimizer="nmuon",
        momentum=0.95,
        lr=1e-2,
        min_lr=0.0,
        warmup_epochs=1,
        weight_decay=0.02,
        crop_padding=4,
        random_erasing=0.25,
        cutmix=1.0,
        mixup_prob=0.25,
        mixup_off_epoch=34,
        ema_decay=0.999,
        precision="bf16-mixed",
        workers=0,
    )


def folder() -> Recipe:
    """A small network on your own images, in {train,val}/<class>/ below `--data`.

    Command: `replknet train folder --data DIR`. Ours, not the paper's: timm's usual augmentation and a
    short schedule on replknet_nano, to be changed to fit the data.
    """
    return Recipe(
        model="replknet_nano",
        dataset="folder",
        epochs=30,
        batch_size=64,
        lr=1e-3,
        warmup_epochs=2,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        drop_path=0.1,
        ema_decay=0.999,
        workers=2,
    )
