"""replknet erf"""

import json
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from replknet.analysis import effective_receptive_field
from replknet.cli.main import CHECKPOINT, TASK, Task, parser
from replknet.data import images, transforms
from replknet.data.download import quiet
from replknet.models import load_model
from replknet.models.staged import StagedNet


def main(argv: list[str]) -> int:
    p = parser("erf", "replknet erf runs/cifar10/model.safetensors --size 96 -o erf.png")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("--task", type=Task, default="classification", help=f"{TASK}; of others the backbone is looked at")
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images or folders; the two shipped by default")
    p.add_argument(
        "--size", type=int, default=1024, help="side in pixels to which images are warped; the paper's is 1024"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("erf.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    from replknet.analysis import plots  # matplotlib is optional

    model, name, mean, std = _NETWORKS[args.task](args.checkpoint)
    transform = transforms.small_image_transform(args.size, mean, std)
    files = images.files(args.images or list(images.PHOTOS))
    batches = (images.batch([file], transform) for file in tqdm(files, desc="receptive field", disable=quiet()))
    field = effective_receptive_field(model, batches)
    plots.save(plots.receptive_fields({name: field}), args.output)
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


# a network, its name, and the mean and std of its pixels
_Fed = tuple[nn.Module, str, tuple[float, ...], tuple[float, ...]]


def _classifier(checkpoint: Path) -> _Fed:
    model, d = load_model(checkpoint, torch.float32)
    return model, d.name, d.mean, d.std


def _segmentation(checkpoint: Path) -> _Fed:
    from replknet.tasks.segmentation_saved import load_segmentation  # its packages are optional

    model, d = load_segmentation(checkpoint, torch.float32)
    return _backbone(model), d.backbone, d.mean, d.std


def _detection(checkpoint: Path) -> _Fed:
    from replknet.tasks.detection_saved import load_detection  # the same

    model, d = load_detection(checkpoint, torch.float32)
    return _backbone(model), d.backbone, d.mean, d.std


def _backbone(model: nn.Module) -> nn.Module:
    (backbone,) = (module for module in model.modules() if isinstance(module, StagedNet))
    return backbone


_NETWORKS = {"classification": _classifier, "segmentation": _segmentation, "detection": _detection}
