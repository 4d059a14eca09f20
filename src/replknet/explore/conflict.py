"""Shape bias of the networks in the kernel-size study."""

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from replknet.analysis import plots
from replknet.analysis.shape_bias import CATEGORIES, ShapeBias, decided, decisions, likeliest, shape_bias
from replknet.data import cifar10, transforms
from replknet.data.cifar10_conflict import conflicts
from replknet.data.cue_conflict import CueConflicts, cue_conflicts
from replknet.explore.experiment import Arm, Column, Experiment, Figures, Results, Scale, Site, compared
from replknet.explore.kernel_sizes import classifiers
from replknet.models import Description, load_model
from replknet.models.timm_model import StagedNet
from replknet.nn import merge

_SIDES = (3, 7, 13, 31)
# number of conflicts for each ordered pair of CIFAR-10's classes
_EACH = 50


def conflict(scale: Scale) -> Experiment:
    """The figure of shape bias in the paper's discussion."""
    arms = tuple(_arm(scale, side, start) for side, start in classifiers(scale).items() if side in _SIDES)
    where = "the order in its figure of shape bias"
    return Experiment(
        name="conflict",
        title="Shape bias: do large kernels follow shape rather than texture?",
        question="Where an image has the shape of one class and the texture of another, which do networks with "
        "small and large kernels follow?",
        scale="The cue-conflict images of Geirhos et al. 2019 and the networks of kernel_sizes."
        if scale == "full"
        else "Our own texture-shape conflicts of CIFAR-10 test images, which are not the stimuli of Geirhos et al. "
        f"(docs/shape-bias.md), {90 * _EACH} images, and the networks of kernel_sizes. The bias is the share of shape "
        "among the decisions for either cue.",
        arms=arms,
        columns=(
            Column(figure="bias", title="shape bias, %", scale=100),
            Column(figure="shape_share", title="decided for the shape, %", scale=100),
            Column(figure="texture_share", title="for the texture, %", scale=100),
            Column(figure="shape_alone", title="right on shape alone, %", scale=100),
            Column(figure="texture_alone", title="right on texture alone, %", scale=100),
        ),
        claims=(compared("RepLKNet-31 follows shape more than RepLKNet-3", "bias", _name(31), _name(3), None, where),),
        draw=lambda results: _draw(arms, results),
        wants=("conflicts",) if scale == "full" else (),
    )


def _name(side: int) -> str:
    return f"RepLKNet-{side}"


def _arm(scale: Scale, side: int, start: Arm) -> Arm:
    images = "published" if scale == "full" else {"cifar10": "ours", "each": _EACH}
    return Arm(
        name=_name(side),
        configuration={"shape bias of": start.key, "images": images},
        run=partial(_measure, scale, start),
        seconds=lambda site: 300.0 if scale == "full" else 10.0,
        seeds=start.seeds,
        needs=(start,),
    )


def _measure(scale: Scale, start: Arm, seed: int, folder: Path, site: Site) -> Figures:
    model, description = load_model(site.folder(start, seed) / "model.safetensors")
    found, alone = _ours(model, site) if scale == "small" else (_published(model, description, site), {})
    return {
        "bias": found.bias,
        "shape_share": found.shape_share,
        "texture_share": found.texture_share,
        **alone,
        "categories": found.categories,
        "shape": found.shape,
        "texture": found.texture,
        "other": found.other,
        "no_conflict": found.no_conflict,
    }


# cached: slow to make, and equal for all networks
_conflicts = cache(lambda data: conflicts(cifar10.load(data), _EACH))


def _ours(model: StagedNet, site: Site) -> tuple[ShapeBias, dict[str, float]]:
    """The counts, and the network's accuracy on each cue alone."""
    found = _conflicts(site.images)
    transform = transforms.small_image_transform(32, cifar10.MEAN, cifar10.STD)
    merged = merge(model)

    def decided_for(images: Tensor) -> Tensor:
        batches = (transform(part).contiguous(memory_format=torch.channels_last) for part in images.split(500))
        return decisions(merged, batches, likeliest)

    alone = {
        "shape_alone": (decided_for(found.shape_cues) == found.shapes).double().mean().item(),
        "texture_alone": (decided_for(found.texture_cues) == found.textures).double().mean().item(),
    }
    return shape_bias(decided_for(found.images), found.shapes, found.textures, cifar10.CLASSES), alone


def _published(model: StagedNet, description: Description, site: Site) -> ShapeBias:
    assert site.conflicts is not None  # the experiment wants it
    categories = tuple(CATEGORIES)
    images = cue_conflicts(site.conflicts, categories)
    still = transforms.eval_transform(description.image_size, description.mean, description.std, description.crop_pct)
    loader = DataLoader(CueConflicts(images, still), 64)
    shapes, textures = (torch.tensor(v) for v in zip(*((i.shape, i.texture) for i in images), strict=True))
    return shape_bias(decisions(merge(model), loader, decided), shapes, textures, categories)


def _draw(arms: tuple[Arm, ...], results: Results) -> object:
    counts = {}
    for arm in arms:
        if runs := results.of(arm.name):
            f = runs[0].figures
            counts[arm.name] = ShapeBias(
                categories=tuple(f["categories"]),
                shape=tuple(f["shape"]),
                texture=tuple(f["texture"]),
                other=tuple(f["other"]),
                no_conflict=f["no_conflict"],
            )
    return plots.shape_bias(counts, "seed 0")
