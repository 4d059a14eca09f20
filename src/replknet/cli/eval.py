"""replknet eval"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from replknet.cli.options import EXPORTED, TASK, TRUST, Parser, add_settings, parser, settings_of
from replknet.data.download import quiet
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_network


def _kinds() -> dict[str, type[Any]]:
    return {name: task.evaluation for name, task in TASKS.items()}


def arguments() -> Parser:
    """The options of the command; each task adds its settings."""
    p = parser("eval", "replknet eval runs/cifar10/model.safetensors --dataset cifar10")
    p.add_argument("checkpoint", type=Path, help=EXPORTED)
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("--trust", action="store_true", help=TRUST)
    p.add_argument(
        "--data", type=Path | None, help="folder or archive of the data set, or the folder that keeps CIFAR-10"
    )
    p.add_argument("--json", action="store_true", help="machine-readable output with all scores")
    add_settings(p, _kinds())
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    network = load_network(args.checkpoint, args.task, trust=args.trust)
    infer, what = network.task.infer, f"{args.checkpoint} is {network.task.noun}"
    settings = settings_of(args, network.task.evaluation, _kinds(), what)
    scored = infer.evaluate(network, args.data, settings, _progress)
    print(json.dumps(scored.record) if args.json else "\n".join(map(shown, scored.lines)))
    return 0


def _progress(batches: Iterable[Any]) -> Iterable[Any]:
    return tqdm(batches, desc="evaluating", disable=quiet())
