"""Optimisers: of networks that stand on a backbone, and what those for matrices leave to another."""

from typing import Any

from timm.optim import create_optimizer_v2
from torch import nn


def by_depth(model: nn.Module, backbone: str, name: str, lr: float, backbone_lr: float, weight_decay: float) -> Any:
    """timm's optimiser of a name, with a learning rate of its own for the backbone, and no decay of biases and norms.

    Args:
        model: the network.
        backbone: how the names of the backbone's parameters begin.
        name: timm's.
        lr: of what is not the backbone.
        backbone_lr: of the backbone, relative to that.
        weight_decay: of parameters with more than one axis.
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


def fallback_of(model: nn.Module, optimizer: str) -> dict[str, Any]:
    """The option that tells timm what AdamW moves beside an optimiser for matrices; none for others."""
    return {"fallback_list": _no_inner_matrices(model)} if "muon" in optimizer else {}


def _no_inner_matrices(model: nn.Module) -> list[str]:
    """Parameters that Muon is not for: anything but the weights of dense convolutions and linear layers, and of
    those the first and the last (Jordan 2024, "Muon: An optimizer for hidden layers in neural networks")."""
    dense = [name for name, p in model.named_parameters() if p.ndim > 1 and p.shape[1] > 1]
    inner = set(dense[1:-1])
    return [name for name, _ in model.named_parameters() if name not in inner]
