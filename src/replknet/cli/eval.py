"""replknet eval"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from replknet.cli.main import CHECKPOINT, TASK, WINDOW, Task, parser
from replknet.data.download import quiet
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("eval", "replknet eval runs/cifar10/model.safetensors --dataset cifar10")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("--task", type=Task, default="classification", help=TASK)
    p.add_argument(
        "--dataset",
        type=Literal["cifar10", "folder", "ade20k", "cityscapes", "masks"] | None,
        help="test images; cifar10 by default, and masks (images/, annotations/, classes.json) in segmentation; in "
        "detection there is only COCO's layout",
    )
    p.add_argument(
        "--data", type=Path | None, help="folder with val/<class>/, of masks or of objects, or where CIFAR-10 is kept"
    )
    p.add_argument("--split", type=Literal["train", "val", "test"], default="val", help="of the masks or objects")
    p.add_argument(
        "--malformed",
        type=Literal["error", "skip"],
        default="error",
        help="what is done about annotations of objects that cannot be used",
    )
    p.add_argument("--batch-size", type=int, default=256, help="images at a time, in classification")
    p.add_argument("--unreadable-images", type=int, default=0, help="that may be skipped; one more is an error")
    p.add_argument("--window", type=int | None, help=WINDOW)
    p.add_argument("--stride", type=int | None, help="from one window to the next, pixels")
    p.add_argument(
        "--ratios", type=tuple[float, ...], default=(1.0,), help="sizes of the image to average, as '[1, 1.5]'"
    )
    p.add_argument("--flip", action="store_true", help="average with the mirrored image, in segmentation")
    p.add_argument("--json", action="store_true", help="machine-readable output, with the confusion matrix")
    args = p.parse_args(argv)
    tasks = {"classification": _classification, "segmentation": _segmentation, "detection": _detection}
    return tasks[args.task](args)


def _classification(args: Any) -> int:
    from replknet.tasks.classification.infer import evaluate  # Lightning takes seconds to import
    from replknet.train.loaders import batches, evaluation_set

    name = args.dataset or "cifar10"
    if name not in ("cifar10", "folder"):
        raise ValueError(f"{name} has a class a pixel: score it with --task segmentation")
    model, description = load_model(args.checkpoint, torch.float32)
    dataset = evaluation_set(name, args.data, description, args.unreadable_images)
    scores = evaluate(model, tqdm(batches(dataset, args.batch_size), desc="evaluating", disable=quiet()))
    if args.json:
        print(json.dumps(dataclasses.asdict(scores)))
        return 0
    top5 = "" if scores.top5 is None else f"  top-5 {100 * scores.top5:.2f} %"
    print(f"{scores.images} images  top-1 {100 * scores.top1:.2f} %{top5}  loss {scores.loss:.4f}")
    for label, share in enumerate(scores.per_class):
        print(f"  {description.classes[label] if description.classes else label:<12} {100 * share:.1f} %")
    return 0


def _segmentation(args: Any) -> int:
    from replknet.data.mask_transforms import ForEvaluation
    from replknet.data.masks import MaskSet, Pairs
    from replknet.tasks.segmentation.files import load_segmentation
    from replknet.tasks.segmentation.infer import evaluate, inference_of
    from replknet.train.loaders import batches

    name = args.dataset or "masks"
    if name in ("cifar10", "folder"):
        raise ValueError(f"{name} has a class an image: score it with --task classification")
    if args.data is None:
        raise ValueError("name the folder or zip of the images and masks with --data")
    model, description = load_segmentation(args.checkpoint, torch.float32)
    inference = inference_of(description, args.window, args.stride, args.ratios, args.flip)
    pairs = Pairs(name, args.data, args.split)
    _check_classes(description.classes, pairs.classes.names, args.data)
    loader = batches(MaskSet(pairs, ForEvaluation(description.normalize)), 1)
    scores = evaluate(model, tqdm(loader, desc="evaluating", disable=quiet()), len(description.classes), inference)
    if args.json:
        print(json.dumps(dataclasses.asdict(scores)))
        return 0
    print(
        f"{scores.images} images  mIoU {100 * scores.miou:.2f} %  pixel accuracy {100 * scores.accuracy:.2f} %  "
        f"mean class accuracy {100 * scores.mean_accuracy:.2f} %"
    )
    print(f"  {'class':<20} {'IoU':>7} {'accuracy':>9}")
    for label, iou, accuracy in zip(description.classes, scores.iou, scores.class_accuracy, strict=True):
        print(f"  {label:<20} {_percent(iou):>7} {_percent(accuracy):>9}")
    return 0


def _detection(args: Any) -> int:
    from replknet.data.box_transforms import BoxSet, ForEvaluation, listed
    from replknet.data.coco import CocoImages
    from replknet.tasks.detection.files import load_detection
    from replknet.tasks.detection.infer import evaluate
    from replknet.train.loaders import batches

    if args.dataset is not None:
        raise ValueError(f"objects are in COCO's layout, and {args.dataset} has none: leave out --dataset")
    if args.data is None:
        raise ValueError("name the folder or zip of the images and annotations with --data")
    model, d = load_detection(args.checkpoint, torch.float32)
    images = CocoImages(args.data, args.split, masks=d.masks, malformed=args.malformed)
    if images.problems:
        print(f"left out: {'; '.join(map(str, images.problems))}", file=sys.stderr)
    _check_classes(d.classes, images.classes, args.data)
    loader = batches(BoxSet(images, ForEvaluation(d.scale, d.normalize)), 1, collate=listed)
    scores = evaluate(model, tqdm(loader, desc="evaluating", disable=quiet()), len(d.classes), d.masks)
    if args.json:
        print(json.dumps(dataclasses.asdict(scores)))
        return 0
    print(f"{scores.images} images")
    for what, average in (("boxes", scores.boxes), ("masks", scores.masks)):
        if average is None:
            continue
        print(
            f"{what}  AP {_percent(average.map)}  AP50 {_percent(average.map50)}  AP75 {_percent(average.map75)}  "
            f"small {_percent(average.map_small)}  medium {_percent(average.map_medium)}  large "
            f"{_percent(average.map_large)}  recall {_percent(average.mar100)}"
        )
        for label, ap in zip(d.classes, average.ap, strict=True):
            print(f"  {label:<20} {_percent(ap):>7}")
    return 0


def _check_classes(network: tuple[str, ...], data: tuple[str, ...], where: Path) -> None:
    if network != data:
        raise ValueError(
            f"the network has the classes {', '.join(network[:3])}, ..., and {where} has {', '.join(data[:3])}, ...; "
            "they must be the same, in the same order"
        )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
