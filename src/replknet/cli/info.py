"""replknet info"""

import json
from functools import cache
from typing import Any

import timm
import torch

from replknet.analysis import cost
from replknet.cli.options import Parser, parser
from replknet.models import NETWORKS
from replknet.nn import merge


@cache
def rows() -> list[dict[str, Any]]:
    """For each network its kernels, its parameters in training and merged, and its multiply-adds for one image."""
    found = []
    for name, config in NETWORKS.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        facts = timm.get_pretrained_cfg(name)
        assert facts is not None  # every registered network has a config
        size = facts.input_size[-1]
        merged = cost(merge(model, fold_bn=False), size)
        found.append(
            {
                "name": name,
                "kernels": "-".join(map(str, config.kernels)),
                "image_size": size,
                "parameters": sum(p.numel() for p in model.parameters()),
                "parameters_merged": merged.parameters,
                "multiply_adds_merged": merged.multiply_adds,
                "pretrained": timm.list_models(f"{name}.*", pretrained=True),
            }
        )
    return found


def arguments() -> Parser:
    """The options of the command."""
    p = parser("info", "replknet info --json", files=False)
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return p


def main(argv: list[str]) -> int:
    args = arguments().parse_args(argv)
    found = rows()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'model':<16} {'kernels':<12} {'pixels':>6} {'params M':>9} {'merged M':>9} {'G mult-adds':>12}")
    for row in found:
        print(
            f"{row['name']:<16} {row['kernels']:<12} {row['image_size']:>6} {row['parameters'] / 1e6:>9.2f} "
            f"{row['parameters_merged'] / 1e6:>9.2f} {row['multiply_adds_merged'] / 1e9:>12.3f}"
        )
    return 0
