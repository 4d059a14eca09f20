"""replknet analyze erf"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import nn
from tqdm import tqdm

from replknet import limits
from replknet.analysis import ERF, effective_receptive_field
from replknet.analysis.erf import Scale
from replknet.cli import outputs
from replknet.cli.networks import SEED, is_checkpoint, of_timm
from replknet.cli.options import TASK, Parser, check_at_most, parser
from replknet.data import images, transforms
from replknet.data.download import quiet
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_weights
from replknet.tasks.task import Description

NETWORK = (
    "file of weights, in any format that load_checkpoint reads, or name of weights in the package; otherwise the name "
    "of one of timm's or replknet's models, with random weights"
)


def arguments() -> Parser:
    """The options of the command."""
    p = parser("analyze", "replknet analyze erf replknet_31b resnet101 --images DIR -o erf.png", "erf")
    p.add_argument("network", nargs="+", help=NETWORK)
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("--pretrained", action="store_true", help="load timm's trained weights into timm's models")
    p.add_argument(
        "--untrained",
        action="store_true",
        help=f"also measure each trained network with random weights, seed {SEED}",
    )
    p.add_argument(
        "--images", type=Path, nargs="+", default=[], help="images or folders; two built-in images by default"
    )
    p.add_argument("--count", type=PositiveInt, default=50, help="largest number of images; the paper's is 50")
    p.add_argument(
        "--size", type=PositiveInt, default=1024, help="side in pixels to which images are warped; the paper's is 1024"
    )
    p.add_argument("--scale", type=Scale, default="log", help="scale of the map that is measured; the paper's is log")
    p.add_argument("-o", "--output", type=Path, default=Path("erf.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    check_at_most("--size", args.size, limits.SIDE * limits.factor())
    outputs.check_file(args.output, "--output")
    from replknet.analysis import plots  # matplotlib is optional

    plots.check_ending(args.output)

    files = images.files(args.images or list(images.PHOTOS))[: args.count]
    networks = [network for word in dict.fromkeys(args.network) for network in _networks(word, args)]
    measured = [
        (label, network, _measured(label, network, files, args))
        for label, network in zip(_labels(networks), networks, strict=True)
    ]
    plots.save(plots.receptive_fields({label: field for label, _, field in measured}), args.output)
    if args.json:
        found = {"output": str(args.output), "images": len(files), "size": args.size, "scale": args.scale, "seed": SEED}
        print(json.dumps(found | {"networks": [_record(*one) for one in measured]}))
        return 0
    _print_table(measured)
    print(shown(args.output))
    return 0


@dataclass(frozen=True)
class _Network:
    """A network to measure, and mean and std of its pixels."""

    word: str  # its word on the command line
    name: str
    trained: bool
    parameters: int  # before merging
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _networks(word: str, args: Any) -> list[_Network]:
    """The network of a file or name, and with --untrained its copy with random weights."""
    build: Callable[[], nn.Module]
    if is_checkpoint(word):
        loaded = load_weights(word, args.task)
        d: Description = loaded.description
        # a segmentation network or detector is measured by its backbone
        model, build = _backbone(loaded.model), lambda: _backbone(d.build())
        name, trained, mean, std = d.name, True, d.mean, d.std
    else:
        name, trained = word, args.pretrained
        way_out = "try it without --pretrained" if trained else "try it with another --size"
        model = of_timm(name, trained, way_out, args.size)
        cfg: Any = model.pretrained_cfg
        mean, std = cfg["mean"], cfg["std"]
        build = partial(of_timm, name, False, way_out, args.size)
    found = [_Network(word, name, trained, _parameters(model), _merged(model), mean, std)]
    if trained and args.untrained:
        torch.manual_seed(SEED)
        found.append(replace(found[0], trained=False, model=_merged(build())))
    return found


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _merged(model: nn.Module) -> nn.Module:
    """The network, merged if it is replknet's: it computes the same outputs and keeps fewer maps."""
    return merge(model.eval()) if isinstance(model, StagedNet) else model


def _labels(networks: Sequence[_Network]) -> list[str]:
    """A label for each network: its name, or its word on the command line if two names are equal."""
    counts = Counter((network.name, network.trained) for network in networks)
    names = [shown(n.name if counts[n.name, n.trained] == 1 else n.word) for n in networks]
    return [name if n.trained else f"{name}, untrained" for name, n in zip(names, networks, strict=True)]


def _measured(label: str, network: _Network, files: Sequence[Path], args: Any) -> ERF:
    transform = transforms.small_image_transform(args.size, network.mean, network.std)
    batches = (images.batch([file], transform) for file in tqdm(files, desc=label, disable=quiet()))
    try:
        return effective_receptive_field(network.model, batches, scale=args.scale)
    except (RuntimeError, AssertionError) as error:
        # timm's models refuse a size with different errors
        raise ValueError(
            f"{label} does not run on images of {args.size}x{args.size}: {error}; try it with another --size"
        ) from error


def _record(label: str, network: _Network, field: ERF) -> dict[str, Any]:
    areas, shares = zip(*field.curve(), strict=True)
    return {
        "label": label,
        "network": network.word,
        "name": network.name,
        "trained": network.trained,
        "parameters": network.parameters,
        "images": field.images,
        "skipped": field.skipped,
        "sides": field.sides,
        "areas": field.areas,
        "curve": {"areas": areas, "shares": shares},
    }


def _print_table(measured: Sequence[tuple[str, _Network, ERF]]) -> None:
    """Print side and area of the square that holds each share, one line a network."""
    width = max(len("network"), *(len(label) for label, _, _ in measured))
    thresholds = measured[0][2].sides
    print(f"{'network':<{width}} {'params M':>9}" + "".join(f" {f'{100 * t:.0f} %':>15}" for t in thresholds))
    for label, network, field in measured:
        cells = [_cell(side, field.areas[t]) for t, side in field.sides.items()]
        print(f"{label:<{width}} {network.parameters / 1e6:>9.2f}" + "".join(f" {cell:>15}" for cell in cells))
    for label, _, field in measured:
        if field.skipped:
            print(f"{label}: {field.skipped} images left out, since their gradients are not finite")


def _cell(side: int | None, area: float | None) -> str:
    return "not reached" if side is None or area is None else f"{side} ({100 * area:.1f} %)"


def _backbone(model: nn.Module) -> nn.Module:
    """The network of replknet's inside a segmentation network or detector, or a classifier itself."""
    return next(module for module in model.modules() if isinstance(module, StagedNet))
