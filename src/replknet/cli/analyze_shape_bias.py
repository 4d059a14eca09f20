"""replknet analyze shape-bias"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from replknet.analysis.shape_bias import CATEGORIES, ShapeBias, decisions, likeliest, shape_bias
from replknet.cli import outputs
from replknet.cli.networks import is_checkpoint, of_timm, timm_names
from replknet.cli.options import Parser, check_at_most, parser
from replknet.data import cifar10, cifar10_conflict, transforms
from replknet.data.cue_conflict import CueConflicts, cue_conflicts
from replknet.data.download import quiet
from replknet.models import load_model
from replknet.shown import shown

# name of the measure: which images, and who made them
_PUBLISHED = "cue conflict by the rule of Geirhos et al. 2019 (16 categories of ImageNet)"
_OURS = "replknet's own texture-shape conflict of CIFAR-10 test images (not the stimuli of Geirhos et al.)"

# images for each pair of classes: CIFAR-10 has 1,000 test images of each class
_EACH = 1_000

# width of the table's first column
_LABEL = 22

_Network = tuple[nn.Module, Callable[[Any], Tensor]]


def arguments() -> Parser:
    """The options of the command."""
    p = parser(
        "analyze",
        "replknet analyze shape-bias model.safetensors resnet50 --images stimuli",
        "shape-bias",
    )
    p.add_argument(
        "networks",
        nargs="+",
        type=str,
        help="file of weights, in any format that load_checkpoint reads, or name of weights in the package; with "
        "--images also a name of one of timm's models, whose ImageNet weights timm downloads",
    )
    p.add_argument("--images", type=Path | None, help="folder of images named like cat7-elephant1.png: shape, texture")
    p.add_argument("--cifar10", action="store_true", help="use our own conflicts of CIFAR-10's test images instead")
    p.add_argument("--data", type=Path | None, help="with --cifar10: folder that keeps CIFAR-10")
    p.add_argument(
        "--each", type=PositiveInt, default=100, help="with --cifar10: images for each of the 90 pairs of classes"
    )
    p.add_argument("--seed", type=NonNegativeInt, default=0, help="with --cifar10: seed of the images")
    p.add_argument("--untrained", action="store_true", help="use timm's models with random weights, as a baseline")
    p.add_argument(
        "--batch-size", type=PositiveInt, default=64, help="number of images that a network computes at once"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("shape-bias.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if args.cifar10 == (args.images is not None):
        raise ValueError("name a folder of cue-conflict images with --images DIR, or take our own with --cifar10")
    check_at_most("--each", args.each, _EACH)
    check_at_most("--seed", args.seed, 2**32 - 1)
    outputs.check_file(args.output, "--output")
    from replknet.analysis import plots  # matplotlib is optional

    plots.check_ending(args.output)

    measure = _OURS if args.cifar10 else _PUBLISHED
    found, alone = _on_cifar10(args) if args.cifar10 else (_on_folder(args), {})
    plots.save(plots.shape_bias(found, "our CIFAR-10 conflicts" if args.cifar10 else "cue conflict"), args.output)
    if args.json:
        print(json.dumps(_plain(measure, found, alone, args.output)))
        return 0
    print(measure)
    any_of = next(iter(found.values()))
    print(f"{any_of.images} images with a conflict; {any_of.no_conflict} without one were left out")
    print("shape bias = shape / (shape + texture), the share of shape among the decisions for either\n")
    _print_table(found, alone)
    print(shown(args.output))
    return 0


def _on_folder(args: Any) -> dict[str, ShapeBias]:
    images = cue_conflicts(args.images, tuple(CATEGORIES))
    shapes, textures = (torch.tensor(labels) for labels in zip(*((i.shape, i.texture) for i in images), strict=True))
    found = {}
    for name in dict.fromkeys(args.networks):
        model, transform = _imagenet_network(name, args.untrained)
        loader = DataLoader(CueConflicts(images, transform), args.batch_size)
        decided = decisions(model, tqdm(loader, desc=shown(name), disable=quiet()))
        found[name] = shape_bias(decided, shapes, textures, tuple(CATEGORIES))
    return found


def _imagenet_network(name: str, untrained: bool) -> _Network:
    """A network with the 1000 classes of ImageNet, from a file or from timm, and its transform for evaluation."""
    if not is_checkpoint(name):
        return _of_timm(name, untrained)
    model, d = load_model(name, torch.float32)
    _check_outputs(name, d.num_classes)
    if d.classes and list(d.classes) != ImageNetInfo().label_names():
        raise ValueError(
            f"{name} has classes that are not ImageNet's in the order of ILSVRC-2012: expected n01440764, n01443537, "
            f"..., got {', '.join(d.classes[:2])}, ..."
        )
    return model, transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)


def _of_timm(name: str, untrained: bool) -> _Network:
    if name in timm_names(name):
        # before timm downloads weights
        facts = timm.get_pretrained_cfg(name)
        _check_outputs(name, 1000 if facts is None else facts.num_classes)
    model = of_timm(name, not untrained, "name a file of weights, or --untrained takes it as it is initialised")
    return model, create_transform(**resolve_model_data_config(model), is_training=False)


def _check_outputs(name: str, outputs: int) -> None:
    if outputs != 1000:
        raise ValueError(
            f"{name} has {outputs} outputs; images in a folder need a network with the 1000 classes of ImageNet"
            + (" (for CIFAR-10's ten there is --cifar10)" if outputs == 10 else "")
        )


def _on_cifar10(args: Any) -> tuple[dict[str, ShapeBias], dict[str, dict[str, float]]]:
    """The decisions of each network, and its accuracy on either cue alone."""
    networks = {name: _cifar10_network(name) for name in args.networks}
    c = cifar10_conflict.conflicts(cifar10.load(args.data), args.each, args.seed)
    found, alone = {}, {}
    for name, (model, transform) in networks.items():

        def decided(images: Tensor, network: _Network = (model, transform), name: str = name) -> Tensor:
            batches = _batches(images, network[1], args.batch_size, name)
            return decisions(network[0], batches, likeliest)

        found[name] = shape_bias(decided(c.images), c.shapes, c.textures, cifar10.CLASSES)
        alone[name] = {
            "shape_alone": (decided(c.shape_cues) == c.shapes).double().mean().item(),
            "texture_alone": (decided(c.texture_cues) == c.textures).double().mean().item(),
        }
    return found, alone


def _cifar10_network(name: str) -> _Network:
    model, d = load_model(name, torch.float32)
    if d.classes != cifar10.CLASSES:
        raise ValueError(
            f"{name} has other classes than CIFAR-10's: expected {', '.join(cifar10.CLASSES[:2])}, ..., got "
            f"{', '.join(d.classes[:2]) + ', ...' if d.classes else f'{d.num_classes} without names'}"
        )
    return model, transforms.small_image_transform(d.image_size, d.mean, d.std)


def _batches(images: Tensor, transform: Callable[[Any], Tensor], size: int, name: str) -> Iterator[Tensor]:
    for part in tqdm(images.split(size), desc=shown(name), disable=quiet()):
        yield transform(part)


def _plain(
    measure: str, found: dict[str, ShapeBias], alone: dict[str, dict[str, float]], output: Path
) -> dict[str, Any]:
    networks = {
        name: {
            "bias": b.bias,
            "shape_share": b.shape_share,
            "texture_share": b.texture_share,
            **alone.get(name, {}),
            "images": b.images,
            "no_conflict": b.no_conflict,
            "per_category": {
                category: {"bias": bias, "shape": s, "texture": t, "other": o}
                for category, bias, s, t, o in zip(
                    b.categories, b.per_category, b.shape, b.texture, b.other, strict=True
                )
            },
        }
        for name, b in found.items()
    }
    return {"measure": measure, "output": str(output), "networks": networks}


def _print_table(found: dict[str, ShapeBias], alone: dict[str, dict[str, float]]) -> None:
    """Print one column a network: the shares of all its decisions, and its bias in each category of the shape."""
    names = [shown(name) for name in found]
    widths = [max(len(name), 8) for name in names]

    def row(label: str, values: list[float | None]) -> None:
        print(f"{label:<{_LABEL}}" + "".join(f"  {_percent(v):>{w}}" for v, w in zip(values, widths, strict=True)))

    print(" " * _LABEL + "".join(f"  {name:>{w}}" for name, w in zip(names, widths, strict=True)))
    row("shape bias", [b.bias for b in found.values()])
    row("took the shape", [b.shape_share for b in found.values()])
    row("took the texture", [b.texture_share for b in found.values()])
    if alone:
        row("right on shape alone", [a["shape_alone"] for a in alone.values()])
        row("right on texture alone", [a["texture_alone"] for a in alone.values()])
    print("\nshape bias by the category of the shape")
    for i, category in enumerate(next(iter(found.values())).categories):
        row(f"  {category}", [b.per_category[i] for b in found.values()])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
