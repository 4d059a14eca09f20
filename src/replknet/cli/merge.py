"""replknet merge"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replknet.cli.main import CHECKPOINT, TASK, Task, parser
from replknet.data import images, transforms
from replknet.difference import largest_difference
from replknet.models import load_model, save_model
from replknet.nn import merge, unfolded_norms

# relative L2 difference of the outputs that `merge` promises in float32
BOUND = 2e-5


@dataclass(frozen=True)
class _Network:
    """A network of a file, and what is done with it whatever its task."""

    model: nn.Module
    save: Callable[[nn.Module, Path], None]
    load: Callable[[Path], nn.Module]
    random: Tensor  # images for a check
    image: Callable[[Path], Tensor]  # a file as the network wants it, a batch of one
    # what is compared
    output: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)


def main(argv: list[str]) -> int:
    p = parser("merge", "replknet merge RepLKNet-31B_ImageNet-1K_224.pth 31b.safetensors --verify")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("output", type=Path, help="safetensors file to write")
    p.add_argument("--task", type=Task, default="classification", help=TASK)
    p.add_argument("--branches-only", action="store_true", help="merge the parallel kernels, keep the norms")
    p.add_argument(
        "--verify",
        action="store_true",
        help="compare logits, or a detector's pyramid, before and after; exit 1 above the bound",
    )
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images to verify on, beside the two shipped")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"the result is a .safetensors file, got {args.output}")

    network = _NETWORKS[args.task](args.checkpoint)
    model = network.model
    merged = merge(model, fold_bn=not args.branches_only)
    network.save(merged, args.output)
    result: dict[str, Any] = {
        "output": str(args.output),
        "parameters_before": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in merged.parameters()),
        "norms_left": unfolded_norms(merged),
    }
    worst = 0.0
    if args.verify:
        # what is compared is the file, read back
        merged = network.load(args.output)
        inputs = {"random": list(network.random.split(1))}
        # photographs are in RGB
        if network.random.shape[1] == 3:
            inputs["images"] = [network.image(file) for file in images.files([*images.PHOTOS, *args.images])]
        differences = {}
        for name, batches in inputs.items():
            with torch.inference_mode():
                found = [largest_difference(network.output(model, x), network.output(merged, x)) for x in batches]
            absolute, relative = (max(values) for values in zip(*found, strict=True))
            differences[name] = {"inputs": len(batches), "largest_absolute": absolute, "relative_l2": relative}
            worst = max(worst, relative)
        result["differences"] = differences
        result["bound"] = BOUND
    print(json.dumps(result) if args.json else _text(result))
    if not worst <= BOUND:
        print(f"the outputs differ by {worst:.2e}, more than the bound {BOUND:.0e}", file=sys.stderr)
        return 1
    return 0


def _classification(checkpoint: Path) -> _Network:
    model, d = load_model(checkpoint, torch.float32)
    transform = transforms.eval_transform(d.image_size, d.mean, d.std, d.crop_pct)
    return _Network(
        model,
        save=lambda merged, path: save_model(merged, path, d),  # type: ignore[arg-type]  # it stays a StagedNet
        load=lambda path: load_model(path)[0],
        random=_random(d.in_chans, d.image_size),
        image=lambda file: images.batch([file], transform),
    )


def _segmentation(checkpoint: Path) -> _Network:
    from replknet.tasks.segmentation.files import load_segmentation, save_segmentation  # its packages are optional

    model, d = load_segmentation(checkpoint, torch.float32)
    return _Network(
        model,
        save=lambda merged, path: save_segmentation(merged, path, d),
        load=lambda path: load_segmentation(path)[0],
        random=_random(3, 256),
        image=lambda file: d.normalize(images.pixels(images.read(file)))[None],
    )


def _detection(checkpoint: Path) -> _Network:
    from replknet.data.box_transforms import ForEvaluation  # the packages of detectors are optional
    from replknet.tasks.detection.batches import batched
    from replknet.tasks.detection.files import load_detection, save_detection
    from replknet.tasks.detection.pyramid import Pyramid

    model, d = load_detection(checkpoint, torch.float32)
    fitted = ForEvaluation(d.scale, d.normalize)

    def levels(model: nn.Module, x: Tensor) -> Tensor:
        # boxes are chosen from what these give, and a choice has no bound
        (pyramid,) = (module for module in model.modules() if isinstance(module, Pyramid))
        return torch.cat([level.flatten() for level in pyramid(x)])

    return _Network(
        model,
        save=lambda merged, path: save_detection(merged, path, d),
        load=lambda path: load_detection(path)[0],
        random=_random(3, 256),
        image=lambda file: batched([fitted(images.pixels(images.read(file)), {})[0]])[0],
        output=levels,
    )


_NETWORKS = {"classification": _classification, "segmentation": _segmentation, "detection": _detection}


def _random(channels: int, side: int) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


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
    return "\n".join(lines)
