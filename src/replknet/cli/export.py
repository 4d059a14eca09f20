"""replknet export"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from replknet.cli.main import CHECKPOINT, parser
from replknet.data import images, transforms
from replknet.deploy.classifiers import BOUND, ENDINGS, Format, card_of, export_classifier
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("export", "replknet export replknet_cifar_l --to onnx -o cifar.onnx")
    p.add_argument("checkpoint", type=Path, help=f"{CHECKPOINT}; a classifier")
    p.add_argument("--to", choices=get_args(Format), required=True, help="format of the file; aoti is for this machine")
    p.add_argument("-o", "--output", type=Path | None, help="file to write; named after the checkpoint by default")
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images to check on, beside the two shipped")
    p.add_argument("--licence", type=str, default="unknown", help="of the weights, to stand in the file")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    model, description = load_model(args.checkpoint, torch.float32)
    output = args.output or Path(f"{args.checkpoint.name.removesuffix('.safetensors')}{ENDINGS[args.to]}")
    card = card_of(description, args.licence)
    transform = transforms.eval_transform(card.image_size, card.mean, card.std, card.crop_pct)
    files = images.files([*images.PHOTOS, *args.images])
    difference = export_classifier(model, card, output, args.to, [images.batch([file], transform) for file in files])
    if args.json:
        found = {"output": str(output), "difference": asdict(difference), "bound": BOUND, "images": len(files)}
        print(json.dumps({**found, "card": asdict(card)}))
        return 0
    print(
        f"{output}: the logits of {len(files)} images and of noise in two other sizes differ by at most "
        f"{difference.absolute:.1e}, {difference.relative:.1e} of their norm ({BOUND:.0e} is allowed)"
    )
    return 0
