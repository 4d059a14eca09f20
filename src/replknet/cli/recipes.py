"""replknet recipes"""

import json
from dataclasses import asdict
from inspect import cleandoc

from replknet.cli.main import parser
from replknet.recipes import RECIPES


def main(argv: list[str]) -> int:
    p = parser("recipes", "replknet recipes imagenet1k_31b_224")
    p.add_argument("recipe", nargs="?", choices=list(RECIPES), help="show its text: command, hardware, score")
    p.add_argument("--json", action="store_true", help="machine-readable output, with every field")
    args = p.parse_args(argv)
    chosen = {name: RECIPES[name] for name in ([args.recipe] if args.recipe else RECIPES)}
    texts = {name: cleandoc(recipe.__doc__ or "") for name, recipe in chosen.items()}
    if args.json:
        found = [{"name": name, "text": texts[name], **asdict(recipe())} for name, recipe in chosen.items()]
        print(json.dumps(found, indent=1))
    elif args.recipe:
        print(texts[args.recipe])
    else:
        print(f"{'recipe':<28} {'model':<15} {'pixels':>6} {'epochs':>6} {'batch':>6}  what")
        for name, recipe in chosen.items():
            r = recipe()
            what = texts[name].splitlines()[0]
            print(f"{name:<28} {r.model:<15} {r.image_size:>6} {r.epochs:>6} {r.batch_size:>6}  {what}")
    return 0
