"""Receptive fields of the networks in the kernel-size study, trained and untrained."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from replknet.analysis import effective_receptive_field, plots
from replknet.data import cifar10, images, transforms
from replknet.explore.experiment import Arm, Column, Experiment, Figures, Results, Scale, Site, compared
from replknet.explore.kernel_sizes import classifiers
from replknet.models import Description, load_model
from replknet.nn import merge

_SIDES = (3, 7, 13, 31)
# number and side of the images in the official protocol
_IMAGES, _PIXELS = 50, 1024
# CIFAR-10's images are enlarged, so that the field does not end at their border
_SMALL_IMAGES, _SMALL_PIXELS = 64, 96
# side of the map that is kept for the picture
_KEPT_PIXELS = 48


def fields(scale: Scale) -> Experiment:
    """Figure 1 and Table 10 of the paper."""
    start = classifiers(scale)
    arms = tuple(
        _arm(scale, name, start[side], untrained)
        for side in _SIDES
        for name, untrained in ((f"RepLKNet-{side}", False), (f"RepLKNet-{side}, untrained", True))
    )
    where = "Figure 1; the areas of Table 10 are of ImageNet at 1024 pixels"
    return Experiment(
        name="fields",
        title="Effective receptive fields of small and large kernels, trained and not",
        question="Does a network with larger kernels see further, and does training change that?",
        scale=f"The official protocol on {_IMAGES} images of ImageNet's val at {_PIXELS} pixels."
        if scale == "full"
        else f"The networks of kernel_sizes on the first {_SMALL_IMAGES} test images of CIFAR-10, enlarged to "
        f"{_SMALL_PIXELS} pixels. Areas are the share of the image in the smallest centred square that holds so much "
        "of the log-scaled map.",
        arms=arms,
        columns=tuple(
            Column(figure=f"area_{percent}", title=f"area with {percent} %, %", scale=100, digits=1)
            for percent in (20, 30, 50, 99)
        ),
        claims=(
            compared("RepLKNet-31 sees further than RepLKNet-13", "area_50", "RepLKNet-31", "RepLKNet-13", None, where),
            compared("RepLKNet-13 sees further than RepLKNet-3", "area_50", "RepLKNet-13", "RepLKNet-3", None, where),
        ),
        draw=lambda results: _draw(arms, results),
        wants=("images",) if scale == "full" else (),
    )


def _arm(scale: Scale, name: str, start: Arm, untrained: bool) -> Arm:
    return Arm(
        name=name,
        configuration={
            "receptive field of": start.key,
            "untrained": untrained,
            "images": _IMAGES if scale == "full" else _SMALL_IMAGES,
            "pixels": _PIXELS if scale == "full" else _SMALL_PIXELS,
        },
        run=partial(_measure, scale, start, untrained),
        seconds=lambda site: 300.0 if scale == "full" else 2.0,
        seeds=start.seeds,
        needs=(start,),
    )


def _measure(scale: Scale, start: Arm, untrained: bool, seed: int, folder: Path, site: Site) -> Figures:
    model, description = load_model(site.folder(start, seed) / "model.safetensors")
    network: nn.Module = model
    if untrained:
        torch.manual_seed(seed)
        network = description.build().eval()
    shown = enlarged(site.images) if scale == "small" else _validation(description, site)
    field = effective_receptive_field(merge(network), shown)
    log_map = interpolate(field.log_map[None, None], (_KEPT_PIXELS, _KEPT_PIXELS), mode="area")[0, 0]
    return {
        **{f"area_{round(100 * t)}": area for t, area in field.areas.items()},
        "sides": {str(t): side for t, side in field.sides.items()},
        "images": field.images,
        # percent, one text a row of the map
        "log_map": [" ".join(f"{100 * value:.0f}" for value in row) for row in log_map.tolist()],
    }


def enlarged(data: Path | None, size: int = _SMALL_PIXELS, count: int = _SMALL_IMAGES) -> Iterator[Tensor]:
    """The first `count` test images of CIFAR-10, enlarged, in batches `[16,3,size,size]`."""
    transform = transforms.small_image_transform(size, cifar10.MEAN, cifar10.STD)
    for image in cifar10.load(data)["test_images"][:count].split(16):
        yield torch.stack([transform(x) for x in image])


def _validation(description: Description, site: Site) -> Iterator[Tensor]:
    assert site.images is not None  # the experiment wants it
    transform = transforms.small_image_transform(_PIXELS, description.mean, description.std)
    for file in islice(images.files([site.images / "val"]), _IMAGES):
        yield images.batch([file], transform)


def _draw(arms: tuple[Arm, ...], results: Results) -> object:
    maps = {
        arm.name: [[int(value) / 100 for value in row.split()] for row in runs[0].figures["log_map"]]
        for arm in arms
        if (runs := results.of(arm.name))
    }
    return plots.log_maps(maps)
