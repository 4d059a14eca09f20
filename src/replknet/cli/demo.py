"""replknet demo"""

from pathlib import Path

from replknet.cli import outputs
from replknet.cli.options import Parser, parser
from replknet.shown import shown


def arguments() -> Parser:
    """The options of the command."""
    p = parser("demo", "replknet demo --output runs/demo", files=False)
    p.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the report")
    p.add_argument("--data", type=Path | None, help="folder that keeps CIFAR-10; the cache by default")
    p.add_argument("--epochs", type=int, default=5, help="passes over the training images, for each network")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    outputs.check_folder(args.output, "--output")
    from replknet.explore.demo import run  # Lightning and matplotlib take seconds to import

    print(shown(run(args.output, args.data, args.epochs)))
    return 0
