"""replknet erf"""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse.typing import PositiveInt
from timm.models import get_arch_pretrained_cfgs, resolve_model_input_args
from torch import nn
from tqdm import tqdm

from replknet.analysis import ERF, effective_receptive_field
from replknet.analysis.erf import Scale
from replknet.cli.main import TASK, Task, parser
from replknet.data import images, transforms
from replknet.data.download import quiet
from replknet.models import load_model, shipped
from replknet.models.saved import weights_file
from replknet.models.staged import StagedNet
from replknet.nn import merge

NETWORK = (
    "weights, in any format that load_checkpoint reads, or the name of some that come with the package; else the name "
    "of a model of timm's, ours among them, with random weights"
)
# of all random weights
SEED = 0


def main(argv: list[str]) -> int:
    p = parser("erf", "replknet erf replknet_31b resnet101 --images DIR -o erf.png")
    p.add_argument("network", nargs="+", help=NETWORK)
    p.add_argument("--task", type=Task, default="classification", help=f"{TASK}; of others the backbone is looked at")
    p.add_argument("--pretrained", action="store_true", help="models of timm's with the weights that timm has of them")
    p.add_argument(
        "--untrained",
        action="store_true",
        help=f"beside each trained network the same with random weights, seed {SEED}",
    )
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images or folders; the two shipped by default")
    p.add_argument("--count", type=PositiveInt, default=50, help="take the first images; the paper's number is 50")
    p.add_argument(
        "--size", type=PositiveInt, default=1024, help="side in pixels to which images are warped; the paper's is 1024"
    )
    p.add_argument("--scale", type=Scale, default="log", help="of the map that is measured; the paper's is log")
    p.add_argument("-o", "--output", type=Path, default=Path("erf.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    from replknet.analysis import plots  # matplotlib is optional

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
    print(args.output)
    return 0


@dataclass(frozen=True)
class _Network:
    """A network to measure, and how it wants its pixels."""

    word: str  # what the command line calls it
    name: str
    trained: bool
    parameters: int  # before merging
    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _networks(word: str, args: Any) -> list[_Network]:
    """The network of a file or name, and its untrained twin if that is wanted."""
    if args.task != "classification" or _is_checkpoint(word):
        model, name, mean, std, build = _LOADERS[args.task](Path(word))
        trained = True
    elif word in _timm_names(word):
        name, trained = word, args.pretrained
        model = _created(name, args.size, args.pretrained)
        cfg: Any = model.pretrained_cfg
        mean, std = cfg["mean"], cfg["std"]
        build = partial(_created, name, args.size, False)
    else:
        raise ValueError(_unknown(word))
    found = [_Network(word, name, trained, _parameters(model), _merged(model), mean, std)]
    if trained and args.untrained:
        torch.manual_seed(SEED)
        found.append(replace(found[0], trained=False, model=_merged(build())))
    return found


def _is_checkpoint(word: str) -> bool:
    try:
        weights_file(word)
    except FileNotFoundError:
        return False
    return True


def _timm_names(word: str) -> list[str]:
    """Names under which timm has this architecture: without a tag, and with each that it knows."""
    architecture = word.partition(".")[0]
    return [architecture, *get_arch_pretrained_cfgs(architecture)] if timm.is_model(architecture) else []


def _unknown(word: str) -> str:
    nearest = difflib.get_close_matches(word, [*shipped(), *_timm_names(word)[1:], *timm.list_models()], 3)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() names those"
    return (
        f"{word} is no checkpoint file, none of the weights that come with replknet ({', '.join(shipped())}) and no "
        f"model of timm's; {hint}"
    )


def _created(name: str, size: int, pretrained: bool) -> nn.Module:
    """A model of timm's, for images of this size if it is built for one."""
    torch.manual_seed(SEED)
    try:
        options = resolve_model_input_args(name, {"img_size": (size, size)})
        return timm.create_model(**options, pretrained=pretrained)
    except (RuntimeError, OSError, TypeError, AssertionError) as error:
        # no weights, no server, or a size that the constructor does not take
        what, way = ("with its weights ", "without --pretrained") if pretrained else ("", "with another --size")
        raise ValueError(f"timm cannot build {name} {what}for {size}x{size} images: {error}; try it {way}") from error


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _merged(model: nn.Module) -> nn.Module:
    """Networks of ours with fewer layers: the same function, and fewer maps to keep."""
    return merge(model.eval()) if isinstance(model, StagedNet) else model


def _labels(networks: Sequence[_Network]) -> list[str]:
    """A name for each, and what the command line called it where names are alike."""
    counts = Counter((network.name, network.trained) for network in networks)
    names = [n.name if counts[n.name, n.trained] == 1 else n.word for n in networks]
    return [name if n.trained else f"{name}, untrained" for name, n in zip(names, networks, strict=True)]


def _measured(label: str, network: _Network, files: Sequence[Path], args: Any) -> ERF:
    transform = transforms.small_image_transform(args.size, network.mean, network.std)
    batches = (images.batch([file], transform) for file in tqdm(files, desc=label, disable=quiet()))
    try:
        return effective_receptive_field(network.model, batches, scale=args.scale)
    except (RuntimeError, AssertionError) as error:
        # each of timm's models has its own way to refuse a size
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
    """Side and area of the squares that hold each share, a line a network."""
    width = max(len("network"), *(len(label) for label, _, _ in measured))
    thresholds = measured[0][2].sides
    print(f"{'network':<{width}} {'params M':>9}" + "".join(f" {f'{100 * t:.0f} %':>15}" for t in thresholds))
    for label, network, field in measured:
        cells = [_cell(side, field.areas[t]) for t, side in field.sides.items()]
        print(f"{label:<{width}} {network.parameters / 1e6:>9.2f}" + "".join(f" {cell:>15}" for cell in cells))
    for label, _, field in measured:
        if field.skipped:
            print(f"{label}: {field.skipped} images left out, whose gradients are not finite")


def _cell(side: int | None, area: float | None) -> str:
    return "not reached" if side is None or area is None else f"{side} ({100 * area:.1f} %)"


# a trained network, its name, mean and std of its pixels, and what builds it anew
_Loaded = tuple[nn.Module, str, tuple[float, ...], tuple[float, ...], Callable[[], nn.Module]]


def _classifier(checkpoint: Path) -> _Loaded:
    model, d = load_model(checkpoint, torch.float32)
    return model, d.name, d.mean, d.std, d.build


def _segmentation(checkpoint: Path) -> _Loaded:
    from replknet.tasks.segmentation_saved import load_segmentation  # its packages are optional

    model, d = load_segmentation(checkpoint, torch.float32)
    return _backbone(model), d.backbone, d.mean, d.std, lambda: _backbone(d.build())


def _detection(checkpoint: Path) -> _Loaded:
    from replknet.tasks.detection_saved import load_detection  # the same

    model, d = load_detection(checkpoint, torch.float32)
    return _backbone(model), d.backbone, d.mean, d.std, lambda: _backbone(d.build())


def _backbone(model: nn.Module) -> nn.Module:
    (backbone,) = (module for module in model.modules() if isinstance(module, StagedNet))
    return backbone


_LOADERS = {"classification": _classifier, "segmentation": _segmentation, "detection": _detection}
