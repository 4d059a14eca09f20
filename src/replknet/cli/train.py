"""replknet train"""

import dataclasses
import difflib
import json
import re
import shlex
import sys
import typing
from pathlib import Path
from typing import Any

from replknet.cli.main import Parser, parser
from replknet.recipes import RECIPES, Recipe


def recipe_parser(recipe: Recipe) -> Parser:
    """Every field of a recipe is an option, with the recipe's value as its default."""
    p = parser("train", "replknet train cifar10 --epochs 12 --output runs/longer")
    p.add_argument("recipe", choices=list(RECIPES), help="what to train")
    p.add_argument("--output", type=Path | None, help="folder of the result; runs/RECIPE by default")
    p.add_argument("--data", type=Path | None, help="folder of the images, or where CIFAR-10 is kept")
    p.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    p.add_argument("--config", type=Path | None, help="a file that --print-config wrote; options go before it")
    p.add_argument("--print-config", action="store_true", help="print the resolved recipe as JSON and stop")
    texts = dict(re.findall(r"^        (\w+): (.*(?:\n            .*)*)", Recipe.__doc__ or "", re.MULTILINE))
    types = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        p.add_argument(
            "--" + field.name.replace("_", "-"),
            type=types[field.name],
            default=getattr(recipe, field.name),
            help=" ".join(texts[field.name].split()),
        )
    return p


def resolved(argv: list[str]) -> tuple[Recipe, Any]:
    """The recipe after its preset, a --config file and the options, and the other arguments."""
    name = argv[0] if argv and argv[0] in RECIPES else None
    if name is None and argv and not argv[0].startswith("-"):
        nearest = difflib.get_close_matches(argv[0], RECIPES, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"no recipe is called {argv[0]!r}{hint} There are {', '.join(RECIPES)}")
    recipe = RECIPES[name or "cifar10"]()
    names = [field.name for field in dataclasses.fields(Recipe)]
    file = recipe_parser(recipe).parse_args(argv).config
    if file is not None:
        recipe = dataclasses.replace(recipe, **_read(file, names))
    args = recipe_parser(recipe).parse_args(argv)
    return Recipe(**{field: getattr(args, field) for field in names}), args


def _read(file: Path, names: list[str]) -> dict[str, Any]:
    content = json.loads(file.read_text())
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise ValueError(f"{file} has {', '.join(unknown)}, which no recipe knows; there are {', '.join(names)}")
    if content.get("kernels") is not None:
        content["kernels"] = tuple(content["kernels"])
    return dict(content)


def main(argv: list[str]) -> int:
    recipe, args = resolved(argv)
    if args.print_config:
        print(json.dumps(dataclasses.asdict(recipe), indent=1))
        return 0
    from replknet.train import fit  # Lightning takes seconds to import

    output = args.output or Path("runs") / args.recipe
    try:
        weights = fit(recipe, output, args.data, args.resume)
    except KeyboardInterrupt:
        again = shlex.join(["replknet", "train", *(word for word in argv if word != "--resume")])
        if (output / "last.ckpt").exists():
            print(f"\ninterrupted; the state is in {output}/last.ckpt. Go on with: {again} --resume", file=sys.stderr)
        else:
            print(f"\ninterrupted before there was a state to keep. Start again with: {again}", file=sys.stderr)
        return 130
    print(weights)
    return 0
