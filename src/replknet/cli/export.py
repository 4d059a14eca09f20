"""replknet export"""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from replknet.cli import outputs
from replknet.cli.options import CHECKPOINT, TASK, Parser, add_settings, parser, refuse_settings, settings_of
from replknet.data import images
from replknet.data.download import quiet
from replknet.deploy.files import ENDINGS, PROGRAMS, Format, card_in
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_weights
from replknet.tasks.task import Network


def _settings() -> dict[str, type[Any]]:
    """Name for the help -> settings of int8, for each task that has int8."""
    return {f"{name} with --int8": task.int8 for name, task in TASKS.items() if task.int8 is not None}


def arguments() -> Parser:
    """The options of the command; each task with int8 adds its settings."""
    p = parser("export", "replknet export replknet_cifar_l --to onnx -o cifar.onnx")
    p.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    p.add_argument(
        "--to", choices=get_args(Format), required=True, help="format of the file; aoti runs only on this machine"
    )
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("-o", "--output", type=Path | None, help="file to write; named after the checkpoint by default")
    p.add_argument("--images", type=Path, nargs="+", default=[], help="more images for the check; two are built in")
    p.add_argument("--licence", type=str, default="unknown", help="licence of the weights, written into the file")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    p.add_argument("--int8", action="store_true", help="write a classifier in int8; score and time it before and after")
    add_settings(p, _settings())
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if not args.int8:
        refuse_settings(args, _settings(), "without --int8")
    outputs.check_file(args.output, "--output")
    network = load_weights(args.checkpoint, args.task)
    return _quantized(network, args) if args.int8 else _exported(network, args)


def _exported(network: Network, args: Any) -> int:
    export = network.task.export
    output = args.output or Path(f"{args.checkpoint.name.removesuffix('.safetensors')}{ENDINGS[args.to]}")
    files = images.files([*args.images, *images.PHOTOS])
    difference = export.write(network, output, args.to, [images.read(file) for file in files], args.licence)
    predict = f"replknet predict {shlex.quote(str(output))} IMAGE{' --trust' if args.to in PROGRAMS else ''}"
    if args.json:
        found = {"output": str(output), "difference": asdict(difference), "bound": export.bound, "images": len(files)}
        print(json.dumps({**found, "card": card_in(output, trust=True)[0], "predict": predict}))
        return 0
    print(
        f"{shown(output)}: {export.compared.format(images=len(files))} differ by at most {difference.absolute:.1e}, "
        f"{difference.relative:.1e} of their norm ({export.bound:.0e} is allowed)"
    )
    if args.to in PROGRAMS:
        print(f"it is a program, so that reading it runs code and asks for trust: {shown(predict)}")
    return 0


def _quantized(network: Network, args: Any) -> int:
    task = network.task
    if task.int8 is None or task.export.int8 is None:
        able = ", ".join(task.name for task in TASKS.values() if task.int8 is not None)
        raise ValueError(f"int8 is for {able}, and {args.checkpoint} is {task.noun}")
    int8 = task.export.int8()
    if args.to not in int8.endings:
        raise ValueError(f"int8 is written for {', '.join(int8.endings)}, got --to {args.to}")
    settings = settings_of(args, task.int8, _settings(), f"{args.checkpoint} is {task.noun}")
    output = args.output or Path(f"{args.checkpoint.name.removesuffix('.safetensors')}{int8.endings[args.to]}")
    found = int8.write(network, output, args.to, settings, args.licence, _progress)
    told = found.record if found.problem is None else {**found.record, "error": found.problem}
    print(json.dumps(told) if args.json else "\n".join(map(shown, found.lines)))
    if found.problem is not None:
        print(shown(found.problem), file=sys.stderr)
        return 1
    return 0


def _progress(batches: Iterable[Any], name: str) -> Iterable[Any]:
    return tqdm(batches, desc=name, disable=quiet())
