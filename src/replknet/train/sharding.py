"""Sharding: weights divided among processes (FSDP2), for networks that are too large for one device."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from replknet.nn import ConvFFN, RepLKBlock


def shard(model: nn.Module, mesh: Any) -> None:
    """Divide the weights of a network among the processes of Lightning's mesh, in place; without a mesh do nothing.

    Each block is one unit, which is gathered as a whole; everything outside of blocks is one more unit.
    """
    if mesh is None or isinstance(model, FSDPModule):
        return
    # FSDP2 takes contiguous weights only
    model.to(memory_format=torch.contiguous_format)
    for block in [module for module in model.modules() if isinstance(module, RepLKBlock | ConvFFN)]:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def gather(model: nn.Module, whole: bool) -> None:
    """Gather the whole weights of a sharded network in every process, or divide them again.

    Evaluation needs whole weights: processes have different numbers of images, and must not wait for each other.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                module.unshard()
            else:
                module.reshard()
