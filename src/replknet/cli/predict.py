"""replknet predict"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from replknet.cli.main import CHECKPOINT, TASK, WINDOW, Task, parser
from replknet.data import images, transforms
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("predict", "replknet predict replknet_cifar_l photo.jpg folder --top 3")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("images", type=Path, nargs="+", help="image files, and folders to search")
    p.add_argument("--task", type=Task, default="classification", help=TASK)
    p.add_argument("--top", type=int, default=5, help="classes an image, in classification")
    p.add_argument(
        "-o",
        "--output",
        type=Path | None,
        help="segmentation's overlay: a .png, or a folder where there are many images",
    )
    p.add_argument("--window", type=int | None, help=WINDOW)
    p.add_argument("--stride", type=int | None, help="from one window to the next, pixels")
    p.add_argument("--json", action="store_true", help="one JSON object a line, an image each")
    args = p.parse_args(argv)
    return _segmentation(args) if args.task == "segmentation" else _classification(args)


def _classification(args: Any) -> int:
    if args.output is not None:
        raise ValueError("a picture is what segmentation gives: leave out -o, or add --task segmentation")
    from replknet.tasks.classification import predict  # Lightning takes seconds to import

    model, d = load_model(args.checkpoint, torch.float32)
    transform = transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)
    for file in images.files(args.images):
        guesses = predict(model, images.batch([file], transform), d.classes, args.top)[0]
        if args.json:
            print(json.dumps({"image": str(file), "top": [dataclasses.asdict(guess) for guess in guesses]}))
        else:
            print(f"{file}: " + ", ".join(f"{guess.name} {100 * guess.probability:.1f} %" for guess in guesses))
    return 0


def _segmentation(args: Any) -> int:
    from replknet.analysis import plots
    from replknet.tasks.segmentation import inference_of, predict
    from replknet.tasks.segmentation_saved import load_segmentation

    model, d = load_segmentation(args.checkpoint, torch.float32)
    inference = inference_of(d, args.window, args.stride)
    files = images.files(args.images)
    output: Path | None = args.output
    single = output is not None and output.suffix.lower() == ".png"
    if single and len(files) > 1:
        raise ValueError(f"{len(files)} images need a folder for their overlays, got {output}")
    names = [file.stem for file in files]
    if output is not None and not single and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two of the images are called {twice}, and their overlays would have one name; give one of them"
        )
    for file in files:
        image = images.read(file)
        labels = predict(model, image, d, inference)
        shares = torch.bincount(labels.flatten().long(), minlength=len(d.classes)) / labels.numel()
        found = {d.classes[i]: shares[i].item() for i in shares.argsort(descending=True).tolist() if shares[i] > 0}
        overlay = None
        if output is not None:
            overlay = output if single else output / f"{file.stem}.png"
            overlay.parent.mkdir(parents=True, exist_ok=True)
            plots.save(plots.overlay(image, labels, d.colours.names, d.colours.palette), overlay)
        if args.json:
            print(
                json.dumps({"image": str(file), "overlay": None if overlay is None else str(overlay), "shares": found})
            )
        else:
            print(f"{overlay or file}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items()))
    return 0
