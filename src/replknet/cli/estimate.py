"""replknet train RECIPE --plan"""

import dataclasses
import json
from typing import Any

from replknet.tasks import TASKS
from replknet.train.estimate import USABLE, estimate
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe


def tell(name: str, recipe: Recipe, hardware: Hardware, args: Any) -> int:
    """Print the memory of a device and the steps of a training. Returns 1 if the training does not fit.

    Args:
        name: name of the preset.
        recipe: the training.
        hardware: hardware settings.
        args: has `images`, `classes`, `gpu_memory` and `json`.
    """
    task = TASKS[recipe.task]
    train = task.train
    if train.step is None:
        raise ValueError(f"there is no estimate for {task.noun}: its memory depends on what it finds")
    known_images, known_classes = train.training_set(name, recipe)
    images, classes = args.images or known_images, args.classes or known_classes
    if images is None:
        raise ValueError("the number of training images is not known: give --images N")
    if classes is None:
        raise ValueError("the number of classes is not known: give --classes N")
    found = estimate(recipe, train, hardware, images, classes, args.gpu_memory)
    if args.json:
        fields = {**dataclasses.asdict(found), "processes": hardware.processes, "images": images, "classes": classes}
        print(json.dumps(fields | {"total_bytes": found.memory.total}))
        return 0 if found.fits else 1
    height, width = recipe.options.size
    print(
        f"{name}: {recipe.model}, {found.epochs} epochs of {images:,} images at {height}x{width} pixels, "
        f"{recipe.precision}\n"
        f"{hardware.processes} processes x {found.device_batch} images x {found.accumulate} accumulated = "
        f"{recipe.batch_size} images a step\n"
        f"{found.steps_per_epoch:,} steps an epoch, {found.steps:,} in all\n"
        f"memory of a device: {found.memory.total / 1e9:.2f} GB"
    )
    for part, size in dataclasses.asdict(found.memory).items():
        print(f"  {part:<12} {size / 1e9:8.2f} GB")
    print("images at once and GB, extrapolated:", end=" ")
    print(", ".join(f"{n}: {size / 1e9:.1f}" for n, size in found.by_device_batch.items()))
    if args.gpu_memory is not None:
        fits = "fits" if found.fits else "does not fit"
        print(f"{fits} {args.gpu_memory:g} GB; tensors may take {USABLE:.0%} of them")
    return 0 if found.fits else 1
