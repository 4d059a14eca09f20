"""replknet erf"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from replknet.analysis import effective_receptive_field
from replknet.cli.main import CHECKPOINT, parser
from replknet.data import images, transforms
from replknet.data.download import quiet
from replknet.models import load_model


def main(argv: list[str]) -> int:
    p = parser("erf", "replknet erf runs/cifar10/model.safetensors --size 96 -o erf.png")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images or folders; the two shipped by default")
    p.add_argument(
        "--size", type=int, default=1024, help="side in pixels to which images are warped; the paper's is 1024"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("erf.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    from replknet.analysis import plots  # matplotlib is optional

    model, d = load_model(args.checkpoint, torch.float32)
    transform = transforms.small_image_transform(args.size, d.mean, d.std)
    files = images.files(args.images or list(images.PHOTOS))
    batches = (images.batch([file], transform) for file in tqdm(files, desc="receptive field", disable=quiet()))
    field = effective_receptive_field(model, batches)
    plots.save(plots.receptive_fields({d.name: field}), args.output)
    if args.json:
        print(
            json.dumps({"output": str(args.output), "images": field.images, "sides": field.sides, "areas": field.areas})
        )
        return 0
    for threshold, side in field.sides.items():
        print(
            f"{100 * threshold:.0f} %: "
            + ("not reached" if side is None else f"side {side}, {field.areas[threshold]:.1%}")
        )
    print(args.output)
    return 0
