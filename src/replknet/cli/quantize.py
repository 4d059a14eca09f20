"""replknet quantize"""

import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from torch.utils.data import Subset
from tqdm import tqdm

from replknet.cli.main import CHECKPOINT, parser
from replknet.data import cifar10, images, transforms
from replknet.data.download import quiet
from replknet.deploy.quantizers import Target
from replknet.models import Description, load_model
from replknet.tasks.classification import export as classifiers
from replknet.tasks.classification.export import Exported, card_of, export_classifier
from replknet.tasks.classification.quantize import ENDINGS, AccuracyError, quantize_classifier, size, timed

_BATCH = 64
# images at once whose time is measured
_TIMED = (1, 32)


def main(argv: list[str]) -> int:
    p = parser("quantize", "replknet quantize replknet_cifar_l --to onnx --dataset cifar10 -o cifar.int8.onnx")
    p.add_argument("checkpoint", type=Path, help=f"{CHECKPOINT}; a classifier")
    p.add_argument("--to", choices=get_args(Target), required=True, help="format of the file")
    p.add_argument("-o", "--output", type=Path | None, help="file to write; named after the checkpoint by default")
    p.add_argument("--dataset", type=Literal["cifar10", "folder"], default="cifar10", help="images with labels")
    p.add_argument(
        "--data", type=Path | None, help="folder with train/<class>/ and val/<class>/, or where CIFAR-10 is kept"
    )
    p.add_argument("--calibration", type=PositiveInt, default=512, help="training images that give the ranges")
    p.add_argument(
        "--search", type=PositiveInt, default=4096, help="other training images, on which layers are kept in float32"
    )
    p.add_argument("--loss", type=NonNegativeFloat, default=0.5, help="right answers that may be lost, points of top-1")
    p.add_argument("--per-tensor", action="store_true", help="one scale a weight instead of one a channel, to compare")
    p.add_argument("--unreadable-images", type=int, default=0, help="that may be skipped; one more is an error")
    p.add_argument("--licence", type=str, default="unknown", help="of the weights, to stand in the file")
    p.add_argument("--json", action="store_true", help="machine-readable output, with every layer")
    args = p.parse_args(argv)
    try:
        result = _quantized(args)
    except AccuracyError as error:
        print(f"replknet quantize: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if args.json else _text(result))
    lost = 100 * (result["top1_before"] - result["top1_after"])
    if lost > args.loss:
        print(
            f"the test images lose {lost:.2f} points, more than the {args.loss} that the search kept on training "
            "images: a smaller --loss keeps more layers in float32",
            file=sys.stderr,
        )
        return 1
    return 0


def _quantized(args: Any) -> dict[str, Any]:
    from replknet.tasks.classification.infer import evaluate  # Lightning takes seconds to import
    from replknet.train.loaders import batches, evaluation_set

    model, description = load_model(args.checkpoint, torch.float32)
    output = args.output or Path(f"{args.checkpoint.name.removesuffix('.safetensors')}{ENDINGS[args.to]}")
    card = card_of(description, args.licence)
    training = _training_set(args.dataset, args.data, description, args.unreadable_images)
    if len(training) <= args.calibration:
        raise ValueError(
            f"expected more training images than the {args.calibration} for calibration, got {len(training)}; "
            "--calibration N takes fewer"
        )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = [batch[0] for batch in batches(Subset(training, order[: args.calibration]), _BATCH) if batch]
    search = Subset(training, order[args.calibration : args.calibration + args.search])
    found = quantize_classifier(
        model, card, output, args.to, calibration, batches(search, _BATCH), args.loss, not args.per_tensor
    )
    test = evaluation_set(args.dataset, args.data, description, args.unreadable_images)
    with TemporaryDirectory() as folder:
        before = Path(folder) / f"float{classifiers.ENDINGS[args.to]}"
        export_classifier(model, card, before, args.to)
        scores = {
            name: evaluate(Exported(file), tqdm(batches(test, _BATCH), desc=name, disable=quiet()))
            for name, file in (("before", before), ("after", output))
        }
        threads = torch.get_num_threads()
        sides = (card.image_size, card.image_size)
        times = [(n, timed({"before": before, "after": output}, torch.randn(n, 3, *sides), threads)) for n in _TIMED]
    return {
        "output": str(output),
        "to": args.to,
        "per_channel": not args.per_tensor,
        "images": scores["after"].images,
        "top1_before": scores["before"].top1,
        "top1_after": scores["after"].top1,
        "loss_allowed": args.loss,
        "bytes_before": found.bytes_before,
        "bytes_after": size(output),
        "threads": threads,
        "times": [
            {"images": n, **{name: dataclasses.asdict(time) for name, time in both.items()}} for n, both in times
        ],
        "calibration": sum(map(len, calibration)),
        "search": dataclasses.asdict(found),
        "card": dataclasses.asdict(card),
    }


def _training_set(name: str, data: Path | None, d: Description, unreadable: int) -> Any:
    """Training images as they are prepared for a test."""
    if name == "cifar10":
        still = transforms.small_image_transform(d.image_size, d.mean, d.std)
        return cifar10.CIFAR10(cifar10.load(data), True, still)
    if data is None:
        raise ValueError("name the folder of the images with --data DIR")
    still = transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)
    return images.ImageSet(images.source_of(data, "train"), still, unreadable)


def _text(result: dict[str, Any]) -> str:
    search = result["search"]
    before, after = (100 * result[f"top1_{when}"] for when in ("before", "after"))
    small, large = (result[f"bytes_{when}"] / 1e6 for when in ("after", "before"))
    lines = [
        f"{result['output']}: top-1 of {result['images']} test images {before:.2f} % before, {after:.2f} % after",
        f"size {large:.2f} MB before, {small:.2f} MB after",
    ]
    for times in result["times"]:
        n, float_ms, int8_ms = times["images"], times["before"]["p50_ms"], times["after"]["p50_ms"]
        lines.append(
            f"{n} image{'s' if n > 1 else ''} in {float_ms:.2f} ms before, {int8_ms:.2f} ms after "
            f"({float_ms / int8_ms:.2f} times as fast; threads: {result['threads']})"
        )
    lines.append(
        f"search: {search['images']} training images, top-1 {100 * search['before']:.2f} % before, "
        f"{100 * search['all_int8']:.2f} % with all {len(search['layers'])} layers in int8, "
        f"{100 * search['after']:.2f} % in the file, which loses {100 * search['lost']:.2f} points of right answers"
    )
    kept = [layer for layer in search["layers"] if layer["kept"]]
    lines.append(f"layers kept in float32: {len(kept) or 'none'}")
    for layer in sorted(kept, key=lambda layer: -layer["sensitivity"]):
        ranges = layer["ranges"]
        centre = "" if ranges["centre"] is None else f", centre {ranges['centre']:.1f} times the taps around it"
        lines.append(
            f"  {layer['name']} {layer['shape']}: alone it changes the logits by {100 * layer['sensitivity']:.1f} %; "
            f"largest weight {ranges['peak']:.1f} times the channel's rms, {ranges['spread']:.1f} times the median "
            f"channel's largest{centre}"
        )
    return "\n".join(lines)
