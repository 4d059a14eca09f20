"""replknet train"""

import dataclasses
import difflib
import json
import re
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replknet.cli.main import Parser, parser
from replknet.tasks.recipes import RECIPES, AnyRecipe, Hardware

# the arguments in a docstring, and what it says of them
_FIELDS = r"^        (\w+): (.*(?:\n            .*)*)"


def _train_options(p: Parser) -> None:
    p.add_argument("--output", type=Path | None, help="folder of the result; runs/RECIPE by default")
    p.add_argument("--data", type=Path | None, help="folder of the images, or where CIFAR-10 is kept")
    p.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    p.add_argument("--print-config", action="store_true", help="print the resolved recipe as JSON and stop")


def _plan_options(p: Parser) -> None:
    p.add_argument("--gpus", type=int | None, help="processes on a machine, one a GPU; the same as --devices")
    p.add_argument("--gpu-memory", type=float | None, help="of each, in GB")
    p.add_argument("--images", type=int | None, help="of the training set, where the recipe does not say")
    p.add_argument("--classes", type=int | None, help="of the training set")
    p.add_argument("--json", action="store_true", help="machine-readable output, in bytes")


# commands that take a recipe: an example, and their own options
_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "train": ("replknet train cifar10 --epochs 12 --output runs/longer", _train_options),
    "plan": ("replknet plan imagenet1k_31b_224 --nodes 4 --gpus 8 --gpu-memory 80", _plan_options),
}


def recipe_parser(command: str, recipe: AnyRecipe) -> Parser:
    """Every field of a recipe is an option, with the recipe's value as its default."""
    example, add_options = _COMMANDS[command]
    p = parser(command, example)
    p.add_argument("recipe", choices=list(RECIPES), help="what to train")
    add_options(p)
    p.add_argument("--config", type=Path | None, help="a file that --print-config wrote; options go before it")
    for defaults in (recipe, Hardware()):
        kind = type(defaults)
        texts = dict(re.findall(_FIELDS, kind.__doc__ or "", re.MULTILINE))
        types = typing.get_type_hints(kind)
        for name in _names(kind):
            p.add_argument(
                "--" + name.replace("_", "-"),
                type=types[name],
                default=getattr(defaults, name),
                help=" ".join(texts[name].split()),
            )
    return p


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def resolved(command: str, argv: list[str]) -> tuple[AnyRecipe, Hardware, Any]:
    """The recipe after its preset, a --config file and the options, the machine, and the other arguments."""
    if argv and not argv[0].startswith("-") and argv[0] not in RECIPES:
        nearest = difflib.get_close_matches(argv[0], RECIPES, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(RECIPES)}"
        raise ValueError(f"no recipe is called {argv[0]!r}; {hint}")
    # a recipe decides which options there are; any will do for --help alone
    named = next((word for word in argv if word in RECIPES), None)
    preset = RECIPES[named or next(iter(RECIPES))]()
    p = recipe_parser(command, preset)
    args = p.parse_args(argv)
    if args.recipe != named:
        raise ValueError(f"name the recipe before the options: replknet {command} {args.recipe} ...")
    if args.config is not None:
        args = p.parse_args([*_options(args.config, preset), *argv])
    recipe = type(preset)(**{name: getattr(args, name) for name in _names(type(preset))})
    return recipe, Hardware(**{name: getattr(args, name) for name in _names(Hardware)}), args


def _options(file: Path, preset: AnyRecipe) -> list[str]:
    """The fields in a file that --print-config wrote, as the options that they stand for."""
    names = _names(type(preset))
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON, as --print-config writes it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold one JSON object, as --print-config writes it, got {content!r:.40}")
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise ValueError(f"{file} has {', '.join(unknown)}, which no recipe knows; there are {', '.join(names)}")
    return [
        f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in content.items()
    ]


def main(argv: list[str]) -> int:
    recipe, hardware, args = resolved("train", argv)
    if args.print_config:
        print(json.dumps(dataclasses.asdict(recipe), indent=1))
        return 0
    # Lightning takes seconds to import
    from pytorch_lightning.utilities import rank_zero_only

    from replknet.train import LossError, StateError, fit

    output = args.output or Path("runs") / args.recipe
    try:
        weights = fit(recipe, output, args.data, args.resume, hardware)
    except (StateError, LossError) as error:
        print(f"replknet train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = shlex.join(["replknet", "train", *(word for word in argv if word != "--resume")])
        if (output / "last.ckpt").exists():
            print(f"\ninterrupted; the state is in {output}/last.ckpt. Go on with: {again} --resume", file=sys.stderr)
        else:
            print(f"\ninterrupted before there was a state to keep. Start again with: {again}", file=sys.stderr)
        return 130
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # Lightning sets it
        print(weights)
    return 0
