"""Guidelines 2, 3 and 5, and the comparison with dilation, on MobileNetV2 as in the paper's section 3."""

from typing import Any

from replknet.data.published import IMAGES
from replknet.explore.experiment import Arm, Claim, Experiment, Scale, compared
from replknet.explore.training_arms import draw_scores, score_columns, trained
from replknet.tasks.classification.imagenet import imagenet1k_mobilenetv2_100
from replknet.tasks.classification.recipes import ClassificationOptions
from replknet.train.recipe import Recipe

_SEEDS = 3
_SMALL_SCALE = (
    "CIFAR-10 at 28 pixels, one epoch, three seeds. The network keeps the paper's 17 blocks, since guideline 2 is "
    "about depth, at a quarter of the width; its strides are 2 at the stem and 2 at the fourth stage, so that its "
    "maps are 14x14 and then 7x7, those of the paper's last stages, where a 13x13 kernel reaches every pixel from "
    "every other. The paper's strides would leave a map of one pixel."
)
_FULL_SCALE = "ImageNet at 224 pixels, 100 epochs, the recipe imagenet1k_mobilenetv2_100."


def _recipe(scale: Scale, kernels: tuple[int, ...], **network: Any) -> Recipe:
    if scale == "full":
        return imagenet1k_mobilenetv2_100().changed(kernels=kernels, network=network)
    return Recipe(
        model="mobilenetv2_lk",
        kernels=kernels,
        network={"width": 0.25, "stem_stride": 2, "strides": [1, 1, 1, 2, 1, 1, 1], **network},
        epochs=1,
        batch_size=128,
        lr=5e-3,
        warmup_epochs=0.2,
        # this process makes a whole batch faster than a worker process could send it
        workers=0,
        options=ClassificationOptions(dataset="cifar10", image_size=28, min_lr=0.0),
    )


def _arm(scale: Scale, name: str, kernels: tuple[int, ...], **network: Any) -> Arm:
    images = IMAGES["imagenet1k" if scale == "full" else "cifar10"]
    return trained(name, _recipe(scale, kernels, **network), images, seeds=1 if scale == "full" else _SEEDS)


def _all(side: int) -> tuple[int, ...]:
    return (side,) * 7


def _experiment(
    scale: Scale,
    name: str,
    title: str,
    question: str,
    arms: tuple[Arm, ...],
    claims: tuple[Claim, ...],
    paper: dict[str, float],
) -> Experiment:
    return Experiment(
        name=name,
        title=title,
        question=question,
        scale=_FULL_SCALE if scale == "full" else _SMALL_SCALE,
        arms=arms,
        columns=score_columns("top-1, %", paper),
        claims=claims,
        draw=lambda results: draw_scores(arms, results, "top-1, %"),
        wants=("images",) if scale == "full" else (),
    )


def shortcut(scale: Scale) -> Experiment:
    """Guideline 2 (section 3 and Table 2 of the paper)."""
    table = "Table 2, ImageNet top-1"
    paper = {"3x3": 71.76, "3x3, no shortcut": 68.67, "13x13": 72.53, "13x13, no shortcut": 53.98}
    return _experiment(
        scale,
        "shortcut",
        "Guideline 2: the identity shortcut is vital, above all with very large kernels",
        "What do kernels of 3x3 and 13x13 lose without the identity beside each block?",
        (
            _arm(scale, "3x3", _all(3)),
            _arm(scale, "3x3, no shortcut", _all(3), shortcut=False),
            _arm(scale, "13x13", _all(13)),
            _arm(scale, "13x13, no shortcut", _all(13), shortcut=False),
        ),
        (
            compared("13x13 needs the shortcut", "score", "13x13", "13x13, no shortcut", 18.55, table),
            compared("3x3 gains from it", "score", "3x3", "3x3, no shortcut", 3.09, table),
            compared("with it 13x13 is better than 3x3", "score", "13x13", "3x3", 0.77, table),
            compared(
                "without it 13x13 is worse than 3x3", "score", "3x3, no shortcut", "13x13, no shortcut", 14.69, table
            ),
        ),
        paper,
    )


def reparam(scale: Scale) -> Experiment:
    """Guideline 3 (section 3 and Table 3 of the paper)."""
    table = "Table 3, ImageNet top-1"
    paper = {"3x3": 71.76, "9x9": 72.67, "9x9 with 3x3": 73.09, "13x13": 72.53, "13x13 with 3x3": 73.24}
    return _experiment(
        scale,
        "reparam",
        "Guideline 3: a parallel small kernel, folded away later, helps large ones",
        "What does a 3x3 beside each 9x9 or 13x13 add? (13x13 with 5x5 is ours: the paper has it for RepLKNet alone.)",
        (
            _arm(scale, "3x3", _all(3)),
            _arm(scale, "9x9", _all(9)),
            _arm(scale, "9x9 with 3x3", _all(9), small_kernel=3),
            _arm(scale, "13x13", _all(13)),
            _arm(scale, "13x13 with 3x3", _all(13), small_kernel=3),
            _arm(scale, "13x13 with 5x5", _all(13), small_kernel=5),
        ),
        (
            compared("3x3 helps 9x9", "score", "9x9 with 3x3", "9x9", 0.42, table),
            compared("3x3 helps 13x13", "score", "13x13 with 3x3", "13x13", 0.71, table),
            compared("with it 13x13 is better than 9x9", "score", "13x13 with 3x3", "9x9 with 3x3", 0.15, table),
            compared("9x9 with 3x3 is better than 3x3 alone", "score", "9x9 with 3x3", "3x3", 1.33, table),
        ),
        paper,
    )


def last_stage(scale: Scale) -> Experiment:
    """Guideline 5 (section 3 and Table 4 of the paper)."""
    table = "Table 4, ImageNet top-1"
    paper = {"3x3 last": 71.76, "7x7 last": 72.00, "9x9 last": 71.83, "13x13 last": 71.97}
    # the paper's numbers of parameters fit a width of 0.75 with the larger kernel only in the last block
    width = {"width": 0.75} if scale == "full" else {}
    arms = tuple(_arm(scale, f"{k}x{k} last", (*(3,) * 6, k), **width) for k in (3, 7, 9, 13))
    return _experiment(
        scale,
        "last_stage",
        "Guideline 5: large kernels are useful even on small feature maps",
        "What do 7x7, 9x9 and 13x13 add in the last stage alone, where the map is 7x7? The "
        "paper's parameters tell that its last stage is the last block.",
        arms,
        tuple(
            compared(
                f"{k}x{k} is better than 3x3",
                "score",
                f"{k}x{k} last",
                "3x3 last",
                paper[f"{k}x{k} last"] - 71.76,
                table,
            )
            for k in (7, 9, 13)
        ),
        paper,
    )


def dilation(scale: Scale) -> Experiment:
    """Large dense kernels against small dilated ones (Table 11 of the paper)."""
    where = "Table 11, of which we have seen the direction alone"
    return _experiment(
        scale,
        "dilation",
        "Large kernels against dilated small ones",
        "A 3x3 with dilation 4 or 6 spans as many pixels as a 9x9 or 13x13. Does it do as well?",
        (
            _arm(scale, "9x9", _all(9)),
            _arm(scale, "3x3, dilation 4", _all(3), dilation=4),
            _arm(scale, "13x13", _all(13)),
            _arm(scale, "3x3, dilation 6", _all(3), dilation=6),
        ),
        (
            compared("9x9 is better than 3x3 with dilation 4", "score", "9x9", "3x3, dilation 4", None, where),
            compared("13x13 is better than 3x3 with dilation 6", "score", "13x13", "3x3, dilation 6", None, where),
        ),
        {},
    )
