"""What a training is: everything that decides its result, in one frozen record."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training of a classifier.

    Args:
        model: registered name of the network.
        weights: a checkpoint to start from, of any known key format; a classifier of other classes is left out.
        finetune: whether the training makes no sense without `weights`.
        kernels: side of the large kernel of each stage in pixels, odd; None for the network's own.
        network: other options of the network by name, as timm.create_model takes them, such as {"shortcut": false}.
        dataset: "cifar10", or "folder" for images in {train,val}/<class>/, {train,val}.tar with such paths, or
            webdataset's shards in {train,val}/*.tar, or a data set of the Hugging Face hub, whose folder is hfds/NAME.
        image_size: side of the images in pixels.
        normalization: mean and std of the pixels: "imagenet", or "inception" for 0.5 and 0.5; CIFAR-10 has its own.
        evaluate: score the validation images after each epoch; without it no val/ folder is needed.
        epochs: passes over the training images.
        batch_size: images a step, over all devices.
        optimizer: timm's name of it. Those with a fallback, such as nmuon (Muon with Nesterov momentum), move the
            matrices of the 1x1 convolutions, and leave depthwise kernels, stem, classifier, norms and biases to AdamW.
        momentum: of optimizers that have one, such as sgd and nmuon.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_epochs: epochs of linear warm-up, whole or not.
        weight_decay: decay of weights; biases and norms are exempt.
        layer_decay: factor of the learning rate from one layer group to the one before, or None.
        label_smoothing: probability spread over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        mixup_prob: share of the batches that are mixed, if any are.
        mixup_off_epoch: epoch from which none is, 0 for never.
        drop_path: rate of dropped residual branches in the last block.
        crop_padding: pixels of padding for random crops of small images; None for random resized crops.
        auto_augment: timm's name of an augmentation, such as rand-m9-mstd0.5-inc1; None for none.
        color_jitter: range of brightness, contrast and saturation around 1 where there is no auto_augment; images of a
            folder only.
        random_erasing: probability of erasing a rectangle.
        ema_decay: decay of the average of the weights, which is then what is kept and scored, with a score of the
            network itself beside it; None for no average.
        sync_bn: batch norms take the statistics of all processes; on GPUs only, as torch has it.
        precise_bn: batches on which the statistics of batch norms are computed anew before the network is scored or
            kept at the end of an epoch, 0 for none (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm",
            arXiv:2105.07576).
        clip_grad: largest L2 norm of the gradients, or None.
        precision: of Lightning: "32-true", "bf16-mixed" or "16-mixed".
        unreadable_images: images of a folder or archive that may be damaged; each is named and skipped.
        workers: processes that load images.
        seed: of all random numbers.
    """

    model: str
    dataset: Literal["cifar10", "folder"]
    weights: str | None = None
    finetune: bool = False
    kernels: tuple[int, ...] | None = None
    network: dict[str, Any] | None = None
    image_size: int = 224
    normalization: Literal["imagenet", "inception"] = "imagenet"
    evaluate: bool = True
    epochs: int
    batch_size: int
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr: float
    min_lr: float = 1e-6
    warmup_epochs: float = 0
    weight_decay: float = 0.05
    layer_decay: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_off_epoch: int = 0
    drop_path: float = 0.0
    crop_padding: int | None = None
    auto_augment: str | None = None
    color_jitter: float = 0.4
    random_erasing: float = 0.0
    ema_decay: float | None = None
    sync_bn: bool = False
    precise_bn: int = 0
    clip_grad: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    unreadable_images: int = 10
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "min_lr",
            "weight_decay",
            "mixup",
            "cutmix",
            "mixup_off_epoch",
            "color_jitter",
            "precise_bn",
            "unreadable_images",
            "workers",
            "warmup_epochs",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.mixup_prob <= 1:
            raise ValueError(f"mixup_prob must be from 0 to 1, got {self.mixup_prob}")
        for name in ("momentum", "drop_path", "label_smoothing", "random_erasing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}; null for no average")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below the {self.epochs} epochs, got {self.warmup_epochs}")
