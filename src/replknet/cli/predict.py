"""replknet predict"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from replknet.cli import outputs
from replknet.cli.options import EXPORTED, TASK, TRUST, Parser, add_settings, parser, settings_of
from replknet.data import images
from replknet.shown import shown
from replknet.tasks import TASKS
from replknet.tasks.files import load_network


def _kinds() -> dict[str, type[Any]]:
    return {name: task.prediction for name, task in TASKS.items()}


def arguments() -> Parser:
    """The options of the command; each task adds its settings."""
    p = parser("predict", "replknet predict replknet_cifar_l photo.jpg folder --top 3")
    p.add_argument("checkpoint", type=Path, help=EXPORTED)
    p.add_argument("images", type=Path, nargs="+", help="image files, and folders to search")
    p.add_argument("--task", choices=list(TASKS), help=TASK)
    p.add_argument("--trust", action="store_true", help=TRUST)
    p.add_argument(
        "-o",
        "--output",
        type=Path | None,
        help="picture of the result of segmentation or detection: a .png, or a folder for several images",
    )
    p.add_argument("--json", action="store_true", help="machine-readable output, one JSON object a line for each image")
    add_settings(p, _kinds())
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    if args.output is not None:
        (outputs.check_file if _is_picture(args.output) else outputs.check_folder)(args.output, "--output")
    network = load_network(args.checkpoint, args.task, trust=args.trust)
    what = f"{args.checkpoint} is {network.task.noun}"
    settings = settings_of(args, network.task.prediction, _kinds(), what)
    predicted = network.task.infer.predictor(network, settings)
    for file, picture in _pictures(args.images, args.output):
        found = predicted(images.read(file))
        if picture is not None:
            if found.draw is None:
                raise ValueError(f"{what}, which has no pictures: leave out -o")
            from replknet.analysis import plots  # matplotlib is optional

            plots.save(found.draw(), picture)
        if args.json:
            drawn = {} if found.draw is None else {"picture": picture and str(picture)}
            print(json.dumps({"image": str(file), **drawn, **found.record}))
        else:
            print(f"{shown(picture or file)}: {shown(found.text)}")
    return 0


def _is_picture(output: Path) -> bool:
    """Whether the output is one picture, and not a folder of pictures."""
    return output.suffix.lower() == ".png"


def _pictures(paths: Sequence[Path], output: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """The image files, each with the path of its picture or None.

    Raises:
        ValueError: several images have one picture, or two pictures have one name.
    """
    files = images.files(paths)
    single = output is not None and _is_picture(output)
    if single and len(files) > 1:
        raise ValueError(f"{len(files)} images need a folder for their pictures, got {output}")
    names = [file.stem for file in files]
    if output is not None and not single and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two of the images are called {twice}, so that their pictures would have one name; give only one of them"
        )
    for file in files:
        if output is None:
            yield file, None
        else:
            yield file, output if single else output / f"{file.stem}.png"
