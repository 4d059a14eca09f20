"""replknet eval"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from replknet.cli.main import CHECKPOINT, parser
from replknet.data.download import quiet
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("eval", "replknet eval runs/cifar10/model.safetensors --dataset cifar10")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("--dataset", type=Literal["cifar10", "folder"], default="cifar10", help="test images")
    p.add_argument("--data", type=Path | None, help="folder with val/<class>/, or where CIFAR-10 is kept")
    p.add_argument("--batch-size", type=int, default=256, help="images at a time")
    p.add_argument("--unreadable-images", type=int, default=0, help="that may be skipped; one more is an error")
    p.add_argument("--json", action="store_true", help="machine-readable output, with the confusion matrix")
    args = p.parse_args(argv)
    from replknet.tasks.classification import evaluate  # Lightning takes seconds to import
    from replknet.train.datasets import batches, evaluation_set

    model, description = load_model(args.checkpoint, torch.float32)
    dataset = evaluation_set(args.dataset, args.data, description, args.unreadable_images)
    scores = evaluate(model, tqdm(batches(dataset, args.batch_size), desc="evaluating", disable=quiet()))
    if args.json:
        print(json.dumps(dataclasses.asdict(scores)))
        return 0
    top5 = "" if scores.top5 is None else f"  top-5 {100 * scores.top5:.2f} %"
    print(f"{scores.images} images  top-1 {100 * scores.top1:.2f} %{top5}  loss {scores.loss:.4f}")
    for label, share in enumerate(scores.per_class):
        print(f"  {description.classes[label] if description.classes else label:<12} {100 * share:.1f} %")
    return 0
