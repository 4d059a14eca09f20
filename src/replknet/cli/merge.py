"""replknet merge"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from replknet.cli.main import CHECKPOINT, parser
from replknet.data import images, transforms
from replknet.models import load_model, save_model
from replknet.nn import merge, unfolded_norms
from replknet.nn.merge import largest_difference

# relative L2 difference of the logits that `merge` promises in float32
BOUND = 2e-5


def main(argv: list[str]) -> int:
    p = parser("merge", "replknet merge RepLKNet-31B_ImageNet-1K_224.pth 31b.safetensors --verify")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument("output", type=Path, help="safetensors file to write")
    p.add_argument("--branches-only", action="store_true", help="merge the parallel kernels, keep the norms")
    p.add_argument("--verify", action="store_true", help="compare logits before and after; exit 1 above the bound")
    p.add_argument("--images", type=Path, nargs="+", default=[], help="images to verify on, beside the two shipped")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    args = p.parse_args(argv)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"the result is a .safetensors file, got {args.output}")

    model, description = load_model(args.checkpoint, torch.float32)
    merged = merge(model, fold_bn=not args.branches_only)
    save_model(merged, args.output, description)
    result: dict[str, Any] = {
        "output": str(args.output),
        "parameters_before": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in merged.parameters()),
        "norms_left": unfolded_norms(merged),
    }
    worst = 0.0
    if args.verify:
        # what is compared is the file, read back
        merged, _ = load_model(args.output)
        transform = transforms.eval_transform(
            description.image_size, description.mean, description.std, description.crop_pct
        )
        side = description.image_size
        inputs = {
            "random": torch.randn(2, description.in_chans, side, side, generator=torch.Generator().manual_seed(0))
        }
        # photographs are in RGB
        if description.in_chans == 3:
            inputs["images"] = images.batch(images.files([*images.PHOTOS, *args.images]), transform)
        differences = {}
        for name, x in inputs.items():
            with torch.inference_mode():
                absolute, relative = largest_difference(model(x), merged(x))
            differences[name] = {"inputs": len(x), "largest_absolute": absolute, "relative_l2": relative}
            worst = max(worst, relative)
        result["differences"] = differences
        result["bound"] = BOUND
    print(json.dumps(result) if args.json else _text(result))
    if not worst <= BOUND:
        print(f"the logits differ by {worst:.2e}, more than the bound {BOUND:.0e}", file=sys.stderr)
        return 1
    return 0


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
            f"{d['relative_l2']:.2e} of the logits' norm (bound {result['bound']:.0e})"
            for name, d in zip(("random inputs", "real images"), result["differences"].values(), strict=False)
        ]
    return "\n".join(lines)
