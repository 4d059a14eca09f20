"""replknet recipes"""

import json
from dataclasses import asdict
from inspect import cleandoc

from replknet.cli.main import parser
from replknet.tasks.recipes import RECIPES, DetectionRecipe, SegmentationRecipe


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
        print(f"{'recipe':<28} {'model':<16} {'pixels':>8} {'length':>16} {'batch':>6}  what")
        for name, recipe in chosen.items():
            r = recipe()
            what = texts[name].splitlines()[0]
            if isinstance(r, SegmentationRecipe):
                pixels, length = f"{r.crop[0]}x{r.crop[1]}", f"{r.samples:,} crops"
            elif isinstance(r, DetectionRecipe):
                pixels, length = f"{r.scale[1]}x{r.scale[0]}", f"{r.samples:,} images"
            else:
                pixels, length = str(r.image_size), f"{r.epochs} epochs"
            print(f"{name:<28} {r.model:<16} {pixels:>8} {length:>16} {r.batch_size:>6}  {what}")
    return 0
