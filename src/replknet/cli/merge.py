"""replknet merge"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from replknet.cli import outputs
from replknet.cli.options import CHECKPOINT, TASK, Parser, parser
from replknet.data import images
from replknet.difference import largest_difference
from replknet.nn import merge, unfolded_norms
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_weights
from replknet.tasks.task import Network

# largest relative L2 difference of the outputs in float32; `merge` promises it
BOUND = 2e-5


def arguments() -> Parser:
    """The options of the command."""
    p = parser("merge", "replknet merge RepLKNet-31B_ImageNet-1K_224.pth 31b.safetensors --verify")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("output", type=Path, help="safetensors file to write")
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("--branches-only", action="store_true", help="merge the parallel kernels, keep the norms")
    p.add_argument(
        "--verify",
        action="store_true",
        help="compare logits, or a detector's feature pyramid, before and after; exit with 1 above the bound",
    )
    p.add_argument("--images", type=Path, nargs="+", default=[], help="more images for --verify; two are built in")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"the result is a .safetensors file, got {args.output}")
    outputs.check_file(args.output, "OUTPUT")
    network = load_weights(args.checkpoint, args.task)
    merged = merge(network.model, fold_bn=not args.branches_only)
    network.task.files.save(merged, args.output, network.description)
    result: dict[str, Any] = {
        "output": str(args.output),
        "parameters_before": sum(p.numel() for p in network.model.parameters()),
        "parameters_after": sum(p.numel() for p in merged.parameters()),
        "norms_left": unfolded_norms(merged),
    }
    worst = 0.0
    if args.verify:
        result["differences"] = _differences(network, args.output, args.images)
        result["bound"] = BOUND
        worst = max(found["relative_l2"] for found in result["differences"].values())
    if not worst <= BOUND:
        result["error"] = f"the outputs differ by {worst:.2e}, more than the bound {BOUND:.0e}"
    print(json.dumps(result) if args.json else _text(result))
    if "error" not in result:
        return 0
    print(result["error"], file=sys.stderr)
    return 1


def _differences(network: Network, output: Path, more: list[Path]) -> dict[str, dict[str, float]]:
    """The differences between the network and its merged file, read back, on noise and on images."""
    merged = load_weights(output).model
    comparison = network.task.infer.comparison(network)
    inputs = {"random": list(comparison.random.split(1))}
    # photographs have three channels
    if comparison.random.shape[1] == 3:
        inputs["images"] = [comparison.image(images.read(file)) for file in images.files([*images.PHOTOS, *more])]
    differences = {}
    for name, batches in inputs.items():
        with torch.inference_mode():
            found = [
                largest_difference(comparison.output(network.model, x), comparison.output(merged, x)) for x in batches
            ]
        absolute, relative = (max(values) for values in zip(*found, strict=True))
        differences[name] = {"inputs": len(batches), "largest_absolute": absolute, "relative_l2": relative}
    return differences


def _text(result: dict[str, Any]) -> str:
    norms = result["norms_left"]
    more = f", ... ({len(norms)} in all)" if len(norms) > 4 else ""
    lines = [
        f"{result['output']}: {result['parameters_before']:,} parameters before, {result['parameters_after']:,} after",
        f"norms left: {', '.join(norms[:4]) or 'none'}{more}",
    ]
    if "differences" in result:
        lines += [
            f"largest difference on {d['inputs']} {name}: {d['largest_absolute']:.2e} absolute, "
            f"{d['relative_l2']:.2e} of the outputs' norm (bound {result['bound']:.0e})"
            for name, d in zip(("random inputs", "real images"), result["differences"].values(), strict=False)
        ]
    return "\n".join(map(shown, lines))
