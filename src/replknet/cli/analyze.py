"""replknet analyze"""

import importlib

from replknet.cli.options import Parser, nearest, parser

PARTS = {
    "erf": "compute and draw the effective receptive field of networks",
    "kernels": "draw the learned kernels; show where their weight lies and what the small branch added",
    "shape-bias": "measure and draw whether classifiers decide by shape or by texture",
}


def arguments() -> Parser:
    """The parts of the command; each part has its own parser."""
    p = parser("analyze", "replknet analyze erf replknet_31b --images DIR; replknet analyze kernels --help")
    told = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    p.add_argument("part", choices=list(PARTS), metavar="PART", help=told)
    return p


def main(argv: list[str]) -> int:
    part, *rest = argv or [""]
    if part.startswith("-") or not part:
        arguments().parse_args(argv)
    if part not in PARTS:
        raise ValueError(f"no part is called {part!r}{nearest(part, PARTS)}")
    code: int = importlib.import_module(f"replknet.cli.analyze_{part.replace('-', '_')}").main(rest)
    return code
