"""The paper's trainings on ImageNet, with the settings of its official code (Ding et al. 2022, arXiv:2203.06717).

Every score below is the paper's; we have trained none of them. Images lie in {train,val}/<class>/ below `--data`. The
batch size counts all devices: `--devices`, `--nodes` and `--device-batch` divide it.
"""

from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe

_AUGMENTED = "rand-m9-mstd0.5-inc1"


def imagenet1k_31b_224() -> Recipe:
    """RepLKNet-31B on ImageNet-1K at 224 pixels, from scratch.

    Command: `replknet train imagenet1k_31b_224 --data DIR --nodes 4 --devices 8`. Hardware of the paper: 32 GPUs
    with 64 images each, or 8 GPUs with 64 images and 4 accumulated batches. 300 epochs. The paper's top-1: 83.5 %.
    """
    return Recipe(
        model="replknet_31b",
        epochs=300,
        batch_size=2048,
        lr=4e-3,
        warmup_epochs=10,
        drop_path=0.5,
        workers=10,
        options=ClassificationOptions(
            dataset="folder",
            mixup=0.8,
            cutmix=1.0,
            auto_augment=_AUGMENTED,
            random_erasing=0.25,
            ema_decay=0.9999,
        ),
    )


def imagenet1k_31b_384() -> Recipe:
    """RepLKNet-31B from `imagenet1k_31b_224`, fine-tuned at 384 pixels.

    Command: `replknet train imagenet1k_31b_384 --weights FILE --data DIR --nodes 4 --devices 8`. Hardware of the
    paper: 32 GPUs with 32 images each. 30 epochs. The paper's top-1: 84.8 %.
    """
    return _fine_tuned("replknet_31b", 384).changed(batch_size=1024, drop_path=0.8)


def imagenet22k_31b_224() -> Recipe:
    """RepLKNet-31B on ImageNet-22K (21,841 classes) at 224 pixels, for fine-tuning.

    Command: `replknet train imagenet22k_31b_224 --data DIR --nodes 16 --devices 8`. Hardware of the paper: 128 GPUs
    with 32 images each. 90 epochs, without scores and without an average of the weights.
    """
    return imagenet1k_31b_224().changed(
        epochs=90,
        batch_size=4096,
        warmup_epochs=5,
        drop_path=0.1,
        ema_decay=None,
        evaluate=False,
    )


def imagenet22k_31l_224() -> Recipe:
    """RepLKNet-31L on ImageNet-22K, like `imagenet22k_31b_224`.

    Command: `replknet train imagenet22k_31l_224 --data DIR --nodes 16 --devices 8`.
    """
    return imagenet22k_31b_224().changed(model="replknet_31l")


def imagenet22k_to_1k_31b_224() -> Recipe:
    """RepLKNet-31B from ImageNet-22K, fine-tuned on ImageNet-1K at 224 pixels.

    Command: `replknet train imagenet22k_to_1k_31b_224 --weights FILE --data DIR --nodes 2 --devices 8`. Hardware of
    the paper: 16 GPUs with 32 images each. 30 epochs. The paper's top-1: 85.2 %.
    """
    return _fine_tuned("replknet_31b", 224).changed(batch_size=512, drop_path=0.2)


def imagenet22k_to_1k_31b_384() -> Recipe:
    """RepLKNet-31B from ImageNet-22K, fine-tuned on ImageNet-1K at 384 pixels.

    Command: `replknet train imagenet22k_to_1k_31b_384 --weights FILE --data DIR --nodes 4 --devices 8`. Hardware of
    the paper: 32 GPUs with 16 images each. 30 epochs; the learning rate ends at 3e-4. The paper's top-1: 86.0 %.
    """
    return _fine_tuned("replknet_31b", 384).changed(batch_size=512, drop_path=0.3, min_lr=3e-4)


def imagenet22k_to_1k_31l_384() -> Recipe:
    """RepLKNet-31L from ImageNet-22K, fine-tuned like `imagenet22k_to_1k_31b_384`. The paper's top-1: 86.6 %.

    Command: `replknet train imagenet22k_to_1k_31l_384 --weights FILE --data DIR --nodes 4 --devices 8`.
    """
    return imagenet22k_to_1k_31b_384().changed(model="replknet_31l")


def imagenet1k_xl_320() -> Recipe:
    """RepLKNet-XL, fine-tuned on ImageNet-1K at 320 pixels with its own mean and std of 0.5.

    Command: `replknet train imagenet1k_xl_320 --weights FILE --data DIR --nodes 4 --devices 8`. The paper publishes
    no command for this network, and its pre-training data (MegData-73M) is private. Our guess is
    `imagenet22k_to_1k_31l_384` with another model, size, mean and std. The paper's top-1: 87.8 %.
    """
    return imagenet22k_to_1k_31l_384().changed(model="replknet_xl", image_size=320, normalization="inception")


def imagenet1k_b_120() -> Recipe:
    """The paper's study of kernel sizes (its Table 5): RepLKNet-B with 31-29-27-13, 120 epochs at 224 pixels.

    Command: `replknet train imagenet1k_b_120 --model replknet_b_k7 --data DIR --nodes 4 --devices 8`. The other models
    are `replknet_b_k3`, `replknet_b_k13` and `replknet_b_k25`. Settings that the paper does not state are those of
    `imagenet1k_31b_224`. The paper's top-1 by kernels: 3-3-3-3 82.11 %, 7-7-7-7 82.73 %, 13-13-13-13 83.02 %,
    25-25-25-13 83.00 %, 31-29-27-13 83.07 %.
    """
    return imagenet1k_31b_224().changed(epochs=120)


def imagenet1k_mobilenetv2_100() -> Recipe:
    """The paper's ablations on MobileNetV2 (its Tables 2 to 4): 100 epochs at 224 pixels, here with 3x3 kernels.

    Command: `replknet train imagenet1k_mobilenetv2_100 --data DIR --devices 8`. Other rows of the tables take
    `--kernels '[9, 9, 9, 9, 9, 9, 9]'` and `--network '{"small_kernel": 3, "shortcut": false, "dilation": 1}'`.
    Hardware of the paper: 8 GPUs with 32 images each. SGD, decay, cosine, crops and flips are the paper's as far as we
    know them. Learning rate, warm-up and the missing label smoothing are our guess. The paper's top-1: 3x3 71.76 %,
    without shortcuts 68.67 %; 13x13 72.53 %, without shortcuts 53.98 %, with a parallel 3x3 73.24 %; 9x9 72.67 %, with
    a parallel 3x3 73.09 %.
    """
    return Recipe(
        model="mobilenetv2_lk",
        epochs=100,
        batch_size=256,
        optimizer="sgd",
        lr=0.1,
        warmup_epochs=5,
        weight_decay=4e-5,
        workers=10,
        options=ClassificationOptions(
            dataset="folder",
            min_lr=0.0,
            label_smoothing=0.0,
            color_jitter=0.0,
        ),
    )


def _fine_tuned(model: str, image_size: int) -> Recipe:
    """The common settings of the paper's fine-tunings: no mixing, almost no decay, lower rates for earlier layers."""
    return imagenet1k_31b_224().changed(
        model=model,
        finetune=True,
        image_size=image_size,
        epochs=30,
        lr=4e-4,
        warmup_epochs=1,
        weight_decay=1e-8,
        layer_decay=0.7,
        mixup=0.0,
        cutmix=0.0,
    )


RECIPES = (
    imagenet1k_31b_224,
    imagenet1k_31b_384,
    imagenet22k_31b_224,
    imagenet22k_31l_224,
    imagenet22k_to_1k_31b_224,
    imagenet22k_to_1k_31b_384,
    imagenet22k_to_1k_31l_384,
    imagenet1k_xl_320,
    imagenet1k_b_120,
    imagenet1k_mobilenetv2_100,
)
