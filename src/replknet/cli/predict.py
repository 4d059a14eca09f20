"""replknet predict"""

import dataclasses
import json
from pathlib import Path

import torch

from replknet.cli.main import CHECKPOINT, parser
from replknet.data import images, transforms
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("predict", "replknet predict replknet_cifar_l photo.jpg folder --top 3")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("images", type=Path, nargs="+", help="image files, and folders to search")
    p.add_argument("--top", type=int, default=5, help="classes an image")
    p.add_argument("--json", action="store_true", help="one JSON object a line, an image each")
    args = p.parse_args(argv)
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
