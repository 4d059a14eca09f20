"""Optimisers of networks that stand on a backbone."""

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
