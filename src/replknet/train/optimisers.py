"""Optimisers for networks with a backbone, and the parameters that Muon leaves to AdamW."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from replknet.reading import Kind, reading
from replknet.train.recipe import RecipeError


def by_depth(model: nn.Module, backbone: str, name: str, lr: float, backbone_lr: float, weight_decay: float) -> Any:
    """One of timm's optimisers, with a separate learning rate for the backbone and no decay of biases and norms.

    Args:
        model: the network.
        backbone: prefix of the names of the backbone's parameters.
        name: timm's name of the optimiser.
        lr: learning rate of all other parameters.
        backbone_lr: learning rate of the backbone divided by `lr`.
        weight_decay: weight decay of parameters with more than one axis.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter, p in model.named_parameters():
        groups.setdefault((parameter.startswith(backbone), p.ndim > 1), []).append(p)
    return create_optimizer_v2(
        [
            {
                "params": params,
                "lr": lr * (backbone_lr if deep else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (deep, decays), params in groups.items()
        ],
        name,
        lr=lr,
        weight_decay=weight_decay,
        filter_bias_and_bn=False,
    )


def check_optimizer(name: str) -> None:
    """Raise a ValueError if timm has no optimiser of this name, or its package is missing."""
    known = Kind(RecipeError, "an optimiser of timm's", "timm.optim.list_optimizers() names them")
    with reading(f"optimizer {name!r}", known):
        create_optimizer_v2([nn.Parameter(torch.zeros(4, 4))], name, lr=0.1)


def fallback_of(model: nn.Module, optimizer: str) -> dict[str, Any]:
    """timm's option that lists the parameters that Muon leaves to AdamW; empty for other optimisers."""
    return {"fallback_list": _no_inner_matrices(model)} if "muon" in optimizer else {}


def _no_inner_matrices(model: nn.Module) -> list[str]:
    """Names of the parameters that Muon is not for.

    Muon is for the weights of dense convolutions and linear layers, except the first and the last one (Jordan 2024,
    "Muon: An optimizer for hidden layers in neural networks").
    """
    dense = [name for name, p in model.named_parameters() if p.ndim > 1 and p.shape[1] > 1]
    inner = set(dense[1:-1])
    return [name for name, _ in model.named_parameters() if name not in inner]
