"""replknet plan"""

import dataclasses
import json

from replknet.cli.train import resolved
from replknet.tasks.recipes import DetectionRecipe, Recipe


def main(argv: list[str]) -> int:
    recipe, hardware, args = resolved("plan", argv)
    if isinstance(recipe, DetectionRecipe):
        raise ValueError("a plan counts no detectors: how much memory they need depends on what they find")
    if args.gpus is not None:
        hardware = dataclasses.replace(hardware, devices=args.gpus)
    from replknet.train.estimate import USABLE, estimate, training_classes, training_images

    images = args.images or training_images(args.recipe, recipe)
    if images is None:
        raise ValueError("the training images are yours: say how many with --images N")
    classes = args.classes or training_classes(recipe)
    if classes is None:
        raise ValueError("the classes are yours: say how many with --classes N")
    found = estimate(recipe, hardware, images, classes, args.gpu_memory)
    if args.json:
        fields = {**dataclasses.asdict(found), "processes": hardware.processes, "images": images, "classes": classes}
        print(json.dumps(fields | {"total_bytes": found.memory.total}))
        return 0 if found.fits else 1
    size = f"{recipe.image_size}" if isinstance(recipe, Recipe) else "x".join(map(str, recipe.crop))
    print(
        f"{args.recipe}: {recipe.model}, {found.epochs} epochs of {images:,} images at {size} pixels, "
        f"{recipe.precision}\n"
        f"{hardware.processes} processes x {found.device_batch} images x {found.accumulate} accumulated = "
        f"{recipe.batch_size} images a step\n"
        f"{found.steps_per_epoch:,} steps an epoch, {found.steps:,} in all\n"
        f"memory of a device: {found.memory.total / 1e9:.2f} GB"
    )
    for name, size in dataclasses.asdict(found.memory).items():
        print(f"  {name:<12} {size / 1e9:8.2f} GB")
    print("images at once and GB, extrapolated:", end=" ")
    print(", ".join(f"{n}: {size / 1e9:.1f}" for n, size in found.by_device_batch.items()))
    if args.gpu_memory is not None:
        fits = "fits" if found.fits else "does not fit"
        print(f"{fits} {args.gpu_memory:g} GB, of which tensors may take {USABLE:.0%}")
    return 0 if found.fits else 1
