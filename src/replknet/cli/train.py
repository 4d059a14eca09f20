"""replknet train"""

import dataclasses
import json
import shlex
import sys
from inspect import cleandoc
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS
from jsonargparse.typing import PositiveFloat, PositiveInt

from replknet.cli import outputs
from replknet.cli.options import Parser, add_fields, nearest, option_of, parser
from replknet.reading import Kind
from replknet.shown import shown
from replknet.tasks import RECIPES, TASKS
from replknet.train.files import FileError, read_json, told
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe

_CONFIG = Kind(FileError, "JSON as --print-config writes it", "write it anew with --print-config")
# fields that few people change: only --help-all shows them
_RARE = (
    *("finetune", "normalization", "evaluate", "sync_bn", "evaluate_every", "clip_grad"),
    *("momentum", "min_lr", "mixup_prob", "mixup_off_epoch", "crop_padding", "color_jitter", "precise_bn"),
    *("unreadable_images", "layer_decay", "largest_share", "auxiliary_channels", "align_corners"),
    *("malformed", "crop_scales", "flip", "distort", "warmup", "warmup_start"),
    *("save_steps", "grad_checkpointing", "shard", "log_steps"),
)


def arguments(recipe: Recipe | None = None, everything: bool = False) -> Parser:
    """The options: the fields of the recipe, of its task and of the hardware, with their values as defaults.

    Args:
        recipe: the recipe; None: the first preset.
        everything: whether the help shows fields that few people change.
    """
    recipe = recipe or next(iter(RECIPES.values()))()
    hidden = () if everything else _RARE
    p = parser("train", "replknet train cifar10 --epochs 12 --output runs/longer")
    p.usage = "replknet train RECIPE [options]"
    p.add_argument("recipe", nargs="?", type=str, help="what to train; --list shows every recipe")
    p.add_argument("--help-all", action="store_true", help="show every option, also those that few people change")
    p.add_argument("--list", action="store_true", help="show the recipes; with a RECIPE, show its description")
    p.add_argument("--output", type=Path | None, help="folder of the result; runs/RECIPE by default")
    p.add_argument("--data", type=Path | None, help="folder or archive of the images; for CIFAR-10 its folder")
    p.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.ckpt")
    p.add_argument("--config", type=Path | None, help="file that --print-config wrote; options override its values")
    p.add_argument("--print-config", action="store_true", help="print the recipe with all options as JSON and stop")
    p.add_argument("--plan", action="store_true", help="estimate the memory of a device and the steps; train nothing")
    p.add_argument("--gpu-memory", type=PositiveFloat | None, help="with --plan: memory of each GPU, GB")
    p.add_argument("--images", type=PositiveInt | None, help="with --plan: number of your training images")
    p.add_argument("--classes", type=PositiveInt | None, help="with --plan: number of your classes")
    p.add_argument("--json", action="store_true", help="with --plan or --list: machine-readable output")
    # another name for --devices
    p.add_argument("--gpus", type=PositiveInt | None, help=SUPPRESS)
    add_fields(p, recipe, without=_not_of(recipe), hidden=hidden)
    add_fields(p, recipe.options, hidden=hidden)
    add_fields(p, Hardware(), hidden=hidden)
    return p


def _not_of(recipe: Recipe) -> tuple[str, ...]:
    """Fields that are no options: the task's record, and the length in the unit that the recipe does not use."""
    other = "samples" if recipe.samples is None else "epochs"
    return "options", other, f"warmup_{other}"


def resolved(argv: list[str]) -> tuple[Recipe, Hardware, Any]:
    """The recipe, the hardware, and all arguments. Options override a --config file, which overrides the preset."""
    if argv and not argv[0].startswith("-") and argv[0] not in RECIPES:
        raise ValueError(f"no recipe is called {argv[0]!r}{nearest(argv[0], RECIPES)}; replknet train --list")
    # the options depend on the recipe; without a recipe, --help shows the options of the first one
    named = next((word for word in argv if word in RECIPES), None)
    preset = RECIPES[named or next(iter(RECIPES))]()
    p = arguments(preset, everything="--help-all" in argv)
    if "--help-all" in argv:
        p.print_help()
        p.exit()
    args = p.parse_args(argv)
    if args.list:
        return preset, Hardware(), args
    if args.recipe is None:
        raise ValueError("name a recipe; replknet train --list shows them")
    if args.recipe != named:
        raise ValueError(f"name the recipe before the options: replknet train {args.recipe} ...")
    if args.config is not None:
        args = p.parse_args([*_options(args.config, preset), *argv])
    recipe = preset.changed(**{name: getattr(args, name) for name in _names(preset)})
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Hardware)}
    if args.gpus is not None:
        values["devices"] = args.gpus
    return recipe, Hardware(**values), args


def _names(recipe: Recipe) -> list[str]:
    """The fields of a recipe that are options."""
    fields = (*dataclasses.fields(recipe), *dataclasses.fields(recipe.options))
    return [field.name for field in fields if field.name not in _not_of(recipe)]


def _options(file: Path, preset: Recipe) -> list[str]:
    """The fields in a file that --print-config wrote, as options."""
    names = _names(preset)
    content = read_json(file, _CONFIG)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold one JSON object, as --print-config writes it, got {told(content)}")
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise ValueError(f"{file} has {', '.join(unknown)}, which this recipe lacks; there are {', '.join(names)}")
    return [
        f"{option_of(name)}={value if isinstance(value, str) else json.dumps(value)}" for name, value in content.items()
    ]


def main(argv: list[str]) -> int:
    recipe, hardware, args = resolved(argv)
    if args.list:
        return _list(args.recipe, args.json)
    if args.print_config:
        print(json.dumps(recipe.plain, indent=1))
        return 0
    if args.plan:
        from replknet.cli.estimate import tell  # torch takes seconds to import

        return tell(args.recipe, recipe, hardware, args)
    return _train(recipe, hardware, args, argv)


def _train(recipe: Recipe, hardware: Hardware, args: Any, argv: list[str]) -> int:
    # Lightning takes seconds to import
    from pytorch_lightning.utilities import rank_zero_only

    from replknet.tasks.training import fit

    output = args.output or Path("runs") / args.recipe
    outputs.check_folder(output, "--output")
    try:
        weights = fit(recipe, output, args.data, args.resume, hardware)
    except KeyboardInterrupt:
        again = shown(shlex.join(["replknet", "train", *(word for word in argv if word != "--resume")]))
        if (output / "last.ckpt").exists():
            print(
                f"\ninterrupted; the state is in {shown(output)}/last.ckpt. Go on with: {again} --resume",
                file=sys.stderr,
            )
        else:
            print(f"\ninterrupted before there was a state to keep. Start again with: {again}", file=sys.stderr)
        return 130
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # Lightning sets it
        print(shown(weights))
    return 0


def _list(name: str | None, as_json: bool) -> int:
    """Print one line for each recipe, task by task; with a name, print the description of that recipe."""
    chosen = {name: RECIPES[name]} if name else RECIPES
    told = {name: cleandoc(recipe.__doc__ or "") for name, recipe in chosen.items()}
    if as_json:
        found = [{"name": name, "text": told[name], **recipe().plain} for name, recipe in chosen.items()]
        print(json.dumps(found, indent=1))
        return 0
    if name:
        print(told[name])
        return 0
    print(f"{'recipe':<28} {'model':<16} {'pixels':>8} {'length':>17} {'batch':>6}  what")
    for task in TASKS.values():
        for build in task.recipes:
            r = build()
            height, width = r.options.size
            pixels = str(height) if height == width else f"{height}x{width}"
            length = f"{r.epochs} epochs" if r.samples is None else f"{r.samples:,} images"
            what = told[build.__name__].splitlines()[0]
            print(f"{build.__name__:<28} {r.model:<16} {pixels:>8} {length:>17} {r.batch_size:>6}  {what}")
    return 0
