"""replknet bench model"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import nn

from replknet import limits
from replknet.bench.against import AGAINST, Comparison, compare
from replknet.bench.parts import Part, parts
from replknet.cli import outputs
from replknet.cli.networks import SEED, is_checkpoint, of_timm, timm_names, unknown
from replknet.cli.options import CHECKPOINT, THREADS, Parser, check_at_most, parser
from replknet.deploy.inference import optimize
from replknet.shown import shown
from replknet.tasks.files import load_weights

_EXAMPLE = "replknet bench model replknet_31b --against torch,openvino,onnxruntime --output records.jsonl"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what is timed
_KINDS = ("classification", "features", "segmentation")
# classes of a UperNet with random weights, as in ADE20K
_UPERNET_CLASSES = 150


def arguments() -> Parser:
    """The options of the command."""
    p = parser("bench", _EXAMPLE, "model", "time a network in our inference form, in torch and in other runtimes")
    p.add_argument("network", type=str, help=f"{CHECKPOINT}; or one of timm's models, with random weights")
    p.add_argument(
        "--against",
        type=str,
        default=",".join(AGAINST),
        help=f"what to compare with, of {','.join(AGAINST)}; merged is the result of `merge` on our operator",
    )
    p.add_argument(
        "--task",
        choices=_KINDS,
        help="what to build from one of timm's models: a classifier (default), its features, or a UperNet on it",
    )
    p.add_argument("--size", type=PositiveInt, nargs="+", default=[224], help="height and width, pixels; one for both")
    p.add_argument("--batch", type=PositiveInt, default=1, help="number of images")
    p.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="dtype of all ways")
    p.add_argument("--threads", type=PositiveInt | None, help="threads of every way; torch's number by default")
    p.add_argument("--runs", type=PositiveInt, default=10, help="number of rounds")
    p.add_argument("--limit", type=PositiveFloat, default=60.0, help="seconds after which a slow way stops at 3 rounds")
    p.add_argument("--memory", action="store_true", help="also measure the peak memory of each way, in its own process")
    p.add_argument("--keep-memory", action="store_true", help="keep freed memory in the process: faster, more memory")
    p.add_argument("--parts", action="store_true", help="also time each kind of layer of our form")
    p.add_argument("--output", type=Path | None, help="file that gets the record appended as a JSON line")
    p.add_argument("--json", action="store_true", help="print the record instead of tables")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if args.runs < 2:
        raise ValueError(f"--runs must be at least 2, so that there are quantiles, got {args.runs}")
    if len(args.size) > 2:
        raise ValueError(f"--size takes a height and a width, got {len(args.size)} numbers")
    check_at_most("--threads", args.threads, THREADS)
    check_at_most("--size", max(args.size), limits.SIDE)
    check_at_most("--batch times both sides", args.batch * args.size[0] * args.size[-1], limits.PIXELS)
    outputs.check_file(args.output, "--output")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, task = _network(args.network, args.task)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(args.batch, 3, args.size[0], args.size[-1], generator=generator)
    against = [word for word in args.against.split(",") if word]
    dtype = _DTYPES[args.dtype]
    found = compare(
        args.network,
        model,
        x,
        against,
        dtype=dtype,
        runs=args.runs,
        limit_s=args.limit,
        memory=args.memory,
        keep_memory=args.keep_memory,
    )
    divided = parts(optimize(model, x, dtype=dtype), x) if args.parts else []
    record = {
        "suite": "model",
        "task": task,
        "keep_memory": args.keep_memory,
        **asdict(found),
        "parts": [asdict(part) for part in divided],
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if args.json:
        print(json.dumps(record))
    else:
        print("\n".join([*map(shown, _table(found)), *_divided(divided)]))
    return 0


def _network(word: str, task: str | None) -> tuple[nn.Module, str]:
    """The network, and what it is."""
    if is_checkpoint(word):
        if task == "features":
            raise ValueError(f"{word} is a whole network: --task features takes a model's name, such as replknet_31b")
        found = load_weights(word, task)
        if found.task.name not in _KINDS:
            raise ValueError(f"{word} is {found.task.noun}: what is timed takes one batch and gives maps or logits")
        return found.model, found.task.name
    if not timm_names(word):
        raise ValueError(unknown(word))
    if task in (None, "classification"):
        return of_timm(word, False, "name another").eval(), "classification"
    torch.manual_seed(SEED)
    backbone = timm.create_model(word, features_only=True).eval()
    if task == "features":
        return backbone, task
    from replknet.tasks.segmentation.heads import UperNet  # transformers is optional

    return UperNet(backbone, _UPERNET_CLASSES).eval(), "segmentation"


def _table(found: Comparison) -> list[str]:
    """One line a way."""
    facts = found.provenance
    n, _, h, w = found.shape
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{found.network}, {n} image{'s' if n > 1 else ''} of {h}x{w}, {found.dtype}, {facts['threads']} threads",
        f"{facts['device']}; {versions}; commit {facts['commit']}",
        _line("", "ms", "images/s", "x ours", "difference", "held MB", "run adds MB"),
    ]
    for row in found.rows:
        ms = row.timing.p50_ms
        held, added = ("", "")
        if row.memory is not None:
            held = f"{row.memory.held / 1e6:.0f}"
            added = f"{(row.memory.peak - row.memory.held) / 1e6:.0f}"
        rate = f"{1e3 * n / ms:.1f}"
        lines.append(_line(row.way, f"{ms:.1f}", rate, f"{row.ratio:.2f}", f"{row.difference:.1e}", held, added))
    return [*lines, f"medians of runs in turns; load of the machine before, after, by others: {found.load}"]


def _divided(found: list[Part]) -> list[str]:
    if not found:
        return []
    lines = ["", _line("layers of ours", "calls", "ms", "GMACs", "at the rate of a product")]
    for part in found:
        macs, bound = (f"{part.multiply_adds / 1e9:.2f}", f"{part.bound_ms:.1f}") if part.multiply_adds else ("", "")
        lines.append(_line(part.kind, str(part.calls), f"{part.ms:.1f}", macs, bound))
    return lines


def _line(first: str, *others: Any) -> str:
    return f"{first:<40}" + "".join(f"{word:>12}" for word in others)
