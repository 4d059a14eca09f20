"""replknet predict"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replknet.cli.main import CHECKPOINT, TASK, WINDOW, Task, parser
from replknet.data import images, transforms
from replknet.deploy.files import is_exported
from replknet.models import Description, load_model
from replknet.tasks.classification.export import Card, Exported


def main(argv: list[str]) -> int:
    p = parser("predict", "replknet predict replknet_cifar_l photo.jpg folder --top 3")
    p.add_argument("checkpoint", type=Path, help=f"{CHECKPOINT}; or a file that `export` wrote")
    p.add_argument("images", type=Path, nargs="+", help="image files, and folders to search")
    p.add_argument("--task", type=Task, default="classification", help=TASK)
    p.add_argument("--top", type=int, default=5, help="classes an image, in classification")
    p.add_argument(
        "-o",
        "--output",
        type=Path | None,
        help="the picture of segmentation and detection: a .png, or a folder where there are many images",
    )
    p.add_argument("--min-score", type=float, default=0.3, help="of an object, from 0 to 1")
    p.add_argument("--window", type=int | None, help=WINDOW)
    p.add_argument("--stride", type=int | None, help="from one window to the next, pixels")
    p.add_argument("--json", action="store_true", help="one JSON object a line, an image each")
    args = p.parse_args(argv)
    tasks = {"classification": _classification, "segmentation": _segmentation, "detection": _detection}
    return tasks[args.task](args)


def _classification(args: Any) -> int:
    if args.output is not None:
        raise ValueError("pictures are what other tasks give: leave out -o, or add --task segmentation or detection")
    from replknet.tasks.classification.infer import predict  # Lightning takes seconds to import

    model: nn.Module
    d: Description | Card
    if is_exported(args.checkpoint):
        model = exported = Exported(args.checkpoint)
        d = exported.card
    else:
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
    from replknet.tasks.segmentation.files import load_segmentation
    from replknet.tasks.segmentation.infer import inference_of, predict

    model: nn.Module
    if is_exported(args.checkpoint):
        from replknet.tasks.segmentation.export import ExportedSegmenter

        model = exported = ExportedSegmenter(args.checkpoint)
        d = exported.card.description
    else:
        model, d = load_segmentation(args.checkpoint, torch.float32)
    inference = inference_of(d, args.window, args.stride)
    for file, picture in _pictures(args.images, args.output):
        image = images.read(file)
        labels = predict(model, image, d, inference)
        shares = torch.bincount(labels.flatten().long(), minlength=len(d.classes)) / labels.numel()
        found = {d.classes[i]: shares[i].item() for i in shares.argsort(descending=True).tolist() if shares[i] > 0}
        if picture is not None:
            plots.save(plots.overlay(image, labels, d.colours.names, d.colours.palette), picture)
        if args.json:
            print(json.dumps({"image": str(file), "overlay": picture and str(picture), "shares": found}))
        else:
            print(f"{picture or file}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items()))
    return 0


def _detection(args: Any) -> int:
    from replknet.analysis import plots
    from replknet.tasks.detection.average_precision import as_coco_results
    from replknet.tasks.detection.files import load_detection
    from replknet.tasks.detection.infer import predict

    model, d = load_detection(args.checkpoint, torch.float32)
    for file, picture in _pictures(args.images, args.output):
        image = images.read(file)
        found = predict(model, image, d)
        found = {key: value[found["scores"] >= args.min_score] for key, value in found.items()}
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        if picture is not None:
            masks = found["masks"] >= 0.5 if d.masks else None
            plots.save(plots.boxes(image, found["boxes"], labels, scores, d.classes, masks), picture)
        if args.json:
            # COCO's form but for the class, which has its name
            objects = as_coco_results([found], [0], range(len(d.classes)))
            for one in objects:
                one["class"] = d.classes[one.pop("category_id")]
                del one["image_id"]
            print(json.dumps({"image": str(file), "picture": picture and str(picture), "objects": objects}))
        else:
            counts = Counter(d.classes[label] for label in labels)
            told = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
            print(f"{picture or file}: {told}")
    return 0


def _pictures(paths: Sequence[Path], output: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """The image files, each with the picture that is to be written of it; its folder is made.

    Raises:
        ValueError: two pictures would have one name.
    """
    files = images.files(paths)
    single = output is not None and output.suffix.lower() == ".png"
    if single and len(files) > 1:
        raise ValueError(f"{len(files)} images need a folder for their pictures, got {output}")
    names = [file.stem for file in files]
    if output is not None and not single and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two of the images are called {twice}, and their pictures would have one name; give one of them"
        )
    for file in files:
        if output is None:
            yield file, None
            continue
        picture = output if single else output / f"{file.stem}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        yield file, picture
