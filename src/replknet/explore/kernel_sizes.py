"""The study of kernel sizes (Table 5 of the paper): RepLKNet with 3 to 31 on classification and segmentation."""

from replknet.data.published import IMAGES
from replknet.explore.experiment import Arm, Claim, Experiment, Scale, compared
from replknet.explore.training_arms import draw_scores, score_columns, trained
from replknet.tasks.classification.imagenet import imagenet1k_b_120
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.segmentation.recipes import ade20k_31b_512, camvid
from replknet.train.recipe import Recipe

SIDES = (3, 7, 13, 25, 31)
_FULL = {3: "replknet_b_k3", 7: "replknet_b_k7", 13: "replknet_b_k13", 25: "replknet_b_k25", 31: "replknet_31b"}
# sides of replknet_cifar's maps at 32 pixels; on m pixels, taps more than m - 1 from the centre only meet padding
_MAPS = (16, 8, 4, 2)
# training frames of CamVid
_CAMVID = 367
# the paper's figures, %: top-1 on ImageNet, and mIoU on ADE20K with UperNet
_TOP1 = {3: 82.11, 7: 82.73, 13: 83.02, 25: 83.00, 31: 83.07}
_MIOU = {3: 46.05, 7: 48.05, 13: 48.35, 25: 48.68, 31: 49.17}


def kernels_of(side: int) -> tuple[int, ...]:
    """The small network's kernels for one of the paper's sides: this side, but at most 2 * m - 1 on m pixels."""
    return tuple(min(side, 2 * m - 1) for m in _MAPS)


def _recipe(scale: Scale, side: int) -> Recipe:
    if scale == "full":
        return imagenet1k_b_120().changed(model=_FULL[side])
    # the paper's 3-3-3-3 has no small branch
    network = {"small_kernel": None if side == 3 else 3}
    return cifar10().changed(kernels=kernels_of(side), network=network, epochs=2, warmup_epochs=0.4)


def classifiers(scale: Scale) -> dict[int, Arm]:
    """Side -> the arm that trains its classifier."""
    images, seeds = (IMAGES["imagenet1k"], 1) if scale == "full" else (IMAGES["cifar10"], 3)
    return {side: trained(_name(side), _recipe(scale, side), images, seeds) for side in SIDES}


def classification(scale: Scale) -> Experiment:
    """Table 5 of the paper, ImageNet."""
    arms = tuple(classifiers(scale).values())
    small = ", ".join(f"{side}: {'-'.join(map(str, kernels_of(side)))}" for side in SIDES)
    return Experiment(
        name="kernel_sizes",
        title="Kernel sizes: classification",
        question="What do larger kernels add to RepLKNet on classification?",
        scale="ImageNet at 224 pixels, 120 epochs, the recipe imagenet1k_b_120."
        if scale == "full"
        else "replknet_cifar on CIFAR-10, two epochs, three seeds. Its maps are 16, 8, 4 and 2 pixels wide, so the "
        f"paper's sides are cut where no further tap would meet the image: {small}. Beside 3-3-3-3 stands no small "
        "branch, as in the paper.",
        arms=arms,
        columns=score_columns("top-1, %", _by_name(_TOP1)),
        claims=_claims("ImageNet top-1", _TOP1),
        draw=lambda results: draw_scores(arms, results, "top-1, %"),
        wants=("images",) if scale == "full" else (),
    )


def _claims(what: str, paper: dict[int, float]) -> tuple[Claim, ...]:
    pairs = ((7, 3), (13, 7), (31, 13), (31, 3))
    return tuple(
        compared(
            f"{more} is better than {less}",
            "score",
            _name(more),
            _name(less),
            round(paper[more] - paper[less], 2),
            f"Table 5, {what}",
        )
        for more, less in pairs
    )


def _name(side: int) -> str:
    return f"RepLKNet-{side}"


def _by_name(paper: dict[int, float]) -> dict[str, float]:
    return {_name(side): value for side, value in paper.items()}


def segmentation(scale: Scale) -> Experiment:
    """Guideline 4 (section 3 and Table 5 of the paper): downstream tasks gain more from large kernels."""
    start = classifiers(scale)
    arms = tuple(trained(_name(side), _segmentation(scale, side), *_images(scale), start=start[side]) for side in SIDES)
    return Experiment(
        name="segmentation",
        title="Guideline 4: judge by downstream tasks; kernel sizes on segmentation",
        question="Do networks that differ little in classification differ in segmentation, where they start from it?",
        scale="UperNet on ADE20K, the recipe ade20k_31b_512, from the networks of kernel_sizes."
        if scale == "full"
        else "A narrow UperNet on CamVid (367 frames, 11 classes), frames of half the size, about four thousand crops, "
        "from the networks of kernel_sizes of the same seed, whose stem then has a stride of 4. Scored on the 233 test "
        "frames, since val shares a drive with train.",
        arms=arms,
        columns=score_columns("mIoU, %", _by_name(_MIOU)),
        claims=_claims("ADE20K mIoU", _MIOU),
        draw=lambda results: draw_scores(arms, results, "mIoU, %"),
        wants=("masks",),
    )


def _images(scale: Scale) -> tuple[int, int]:
    """Number of training images, and number of seeds."""
    return (IMAGES["ade20k"], 1) if scale == "full" else (_CAMVID, 2)


def _segmentation(scale: Scale, side: int) -> Recipe:
    if scale == "full":
        return ade20k_31b_512().changed(model=_FULL[side], finetune=False)
    return camvid().changed(
        model="replknet_cifar",
        weights=None,
        kernels=kernels_of(side),
        network={"stem_stride": 4, "small_kernel": None if side == 3 else 3},
        scale=(240, 180),
        crop=(160, 224),
        samples=11 * _CAMVID,
        warmup_samples=_CAMVID,
        # only the score on the test frames counts, after the last epoch
        evaluate=False,
    )
