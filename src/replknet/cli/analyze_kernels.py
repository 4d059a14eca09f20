"""replknet analyze kernels"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from torch import nn

from replknet.analysis.learned_kernels import (
    LayerKernels,
    branch_agreement,
    energy_within,
    layer_kernels,
    magnitude_by_distance,
    small_share,
)
from replknet.cli import outputs
from replknet.cli.networks import is_checkpoint, of_timm, timm_names, unknown
from replknet.cli.options import CHECKPOINT, TASK, Parser, parser
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_weights


def arguments() -> Parser:
    """The options of the command."""
    p = parser("analyze", "replknet analyze kernels replknet_cifar_l -o kernels.png --layers 'stages.1.*'", "kernels")
    p.add_argument("network", type=str, help=f"{CHECKPOINT}; or a timm model, with --pretrained or --untrained")
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("--pretrained", action="store_true", help="a timm model with its trained weights, downloaded")
    p.add_argument("--untrained", action="store_true", help="a timm model with random weights")
    p.add_argument(
        "--layers", type=str, nargs="+", default=["*"], metavar="NAME", help="only these; * and ? are wildcards"
    )
    p.add_argument("--min-side", type=PositiveInt, default=5, help="side of the smallest kernels to show, pixels")
    p.add_argument("-o", "--output", type=Path, default=Path("kernels.png"), help="picture to write")
    p.add_argument("--json", action="store_true", help="machine-readable output, with the magnitudes by distance")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if args.pretrained and args.untrained:
        raise ValueError("--pretrained and --untrained were both given; give one of them")
    outputs.check_file(args.output, "--output")
    from replknet.analysis import plots  # matplotlib is optional

    plots.check_ending(args.output)

    network = _network(args)
    layers = _chosen(layer_kernels(network, args.min_side), args.layers)
    title = shown(f"{args.network}, random weights" if args.untrained else args.network)
    plots.save(plots.kernels(layers, title), args.output)
    found = [_facts(layer) for layer in layers]
    if args.json:
        result = {"output": str(args.output), "network": args.network, "untrained": args.untrained, "layers": found}
        print(json.dumps(result))
    else:
        print("\n".join([*map(shown, _table(found)), shown(args.output)]))
    return 0


def _network(args: Any) -> nn.Module:
    if args.pretrained or args.untrained:
        way_out = "name a file of weights, or --untrained shows random ones"
        return of_timm(args.network, args.pretrained, way_out)
    if not is_checkpoint(args.network):
        if args.network not in timm_names(args.network):
            raise ValueError(unknown(args.network))
        raise ValueError(
            f"{args.network} is a timm model, not a file of weights: --pretrained downloads its trained weights, "
            "--untrained shows random ones"
        )
    return load_weights(args.network, args.task).model


def _chosen(layers: list[LayerKernels], patterns: list[str]) -> list[LayerKernels]:
    chosen = [layer for layer in layers if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
    if not chosen:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"no layer is called {' or '.join(patterns)}; there are {names}")
    return chosen


def _facts(layer: LayerKernels) -> dict[str, Any]:
    parts = {"merged": layer.merged, "large": layer.large, "small": layer.small}
    profiles = {
        name: None if part is None else magnitude_by_distance(part, layer.merged) for name, part in parts.items()
    }
    return {
        "layer": layer.name,
        "form": layer.form,
        "sides": layer.sides,
        "channels": layer.channels,
        "zero_channels": int((layer.merged == 0).all((1, 2)).sum()),
        "distances": list(magnitude_by_distance(layer.merged)),
        "magnitudes": {name: None if one is None else list(one.values()) for name, one in profiles.items()},
        "energy_within": {
            name: None if part is None else energy_within(part) for name, part in parts.items() if name != "small"
        },
        "small_side": layer.small_side,
        "small_share": small_share(layer),
        "small_share_within": small_share(layer, layer.small_side),
        "branch_agreement": branch_agreement(layer),
    }


def _table(found: list[dict[str, Any]]) -> list[str]:
    wide = max(len("layer"), *(len(row["layer"]) for row in found))
    lines = [f"{'layer':<{wide}} {'kernel':>7} {'channels':>8} {'centre':>13} {'half side':>13}"]
    with_small = any(row["small_side"] is not None for row in found)
    if with_small:
        lines[0] += f" {'large alone':>13} {'small':>6} {'inside':>6} {'agreement':>9}"
    for row in found:
        energy = row["energy_within"]
        kernel = "x".join(map(str, row["sides"]))
        centre, half = row["small_side"] or 3, (max(row["sides"]) + 1) / 2
        line = f"{row['layer']:<{wide}} {kernel:>7} {row['channels']:>8}"
        line += f" {_share(energy['merged'], centre):>13} {_share(energy['merged'], half):>13}"
        if with_small:
            line += f" {_share(energy['large'], centre):>13} {_number(row['small_share']):>6}"
            line += f" {_number(row['small_share_within']):>6} {_number(row['branch_agreement']):>9}"
        lines.append(line)
    lines.append("centre, half side: share of the squared norm in the central window named, mean over channels")
    if with_small:
        lines += [
            "large alone: share in the centre of the large branch",
            "small, inside: norm of the small branch divided by the norm of the merged kernel, and of its centre",
            "agreement: cosine between the branches in the centre; small, inside, agreement: medians over channels",
        ]
    if any(row["form"] == "merged" for row in found):
        lines.append("already merged: what the small branch added is no longer known")
    zeros = sum(row["zero_channels"] for row in found)
    if zeros:
        lines.append(f"left out: {zeros} kernels that are zero")
    return lines


def _share(energy: dict[int, float] | None, limit: float) -> str:
    """The share in the largest window whose side is at most `limit`, and the side of that window."""
    if energy is None:
        return "-"
    side = max((side for side in energy if side <= limit), default=min(energy))
    return f"{energy[side]:.1%} {side}x{side}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
