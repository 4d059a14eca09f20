"""replknet export"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

import torch

from replknet.cli.main import CHECKPOINT, TASK, parser
from replknet.data import images, transforms
from replknet.deploy.files import BOUND, ENDINGS, Format, opened
from replknet.deploy.verify import Difference
from replknet.models import load_model
from replknet.tasks.classification.export import card_of, export_classifier

# detectors have functions of their own: replknet.tasks.detection.export
_Task = Literal["classification", "segmentation"]


def main(argv: list[str]) -> int:
    p = parser("export", "replknet export replknet_cifar_l --to onnx -o cifar.onnx")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("--to", choices=get_args(Format), required=True, help="format of the file; aoti is for this machine")
    p.add_argument("--task", type=_Task, default="classification", help=TASK)
    p.add_argument("-o", "--output", type=Path | None, help="file to write; named after the checkpoint by default")
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images to check on, beside the two shipped")
    p.add_argument("--licence", type=str, default="unknown", help="of the weights, to stand in the file")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    output = args.output or Path(f"{args.checkpoint.name.removesuffix('.safetensors')}{ENDINGS[args.to]}")
    files = images.files([*images.PHOTOS, *args.images])
    difference = _TASKS[args.task](args.checkpoint, output, args.to, files, args.licence)
    if args.json:
        found = {"output": str(output), "difference": asdict(difference), "bound": BOUND, "images": len(files)}
        print(json.dumps({**found, "card": opened(output, args.task)[0]}))
        return 0
    print(
        f"{output}: the logits of {len(files)} images and of noise in two other sizes differ by at most "
        f"{difference.absolute:.1e}, {difference.relative:.1e} of their norm ({BOUND:.0e} is allowed)"
    )
    return 0


_Exporter = Callable[[Path, Path, Format, Sequence[Path], str], Difference]


def _classification(checkpoint: Path, output: Path, to: Format, files: Sequence[Path], licence: str) -> Difference:
    model, description = load_model(checkpoint, torch.float32)
    card = card_of(description, licence)
    transform = transforms.eval_transform(card.image_size, card.mean, card.std, card.crop_pct)
    examples = [images.batch([file], transform) for file in files]
    return export_classifier(model, card, output, to, examples)


def _segmentation(checkpoint: Path, output: Path, to: Format, files: Sequence[Path], licence: str) -> Difference:
    from replknet.tasks.segmentation.export import example_of, export_segmenter, segmentation_card
    from replknet.tasks.segmentation.files import load_segmentation  # its packages are optional

    model, description = load_segmentation(checkpoint, torch.float32)
    card = segmentation_card(description, licence)
    examples = [example_of(images.read(file), description) for file in files]
    return export_segmenter(model, card, output, to, examples)


_TASKS: dict[_Task, _Exporter] = {"classification": _classification, "segmentation": _segmentation}
