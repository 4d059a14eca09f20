"""What a network costs: parameters and multiply-adds, counted without running it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """What `cost` counts.

    Args:
        parameters: number of parameters.
        multiply_adds: of one image; a multiplication with its addition counts as one. The paper calls them FLOPs.
        image_size: side of the image in pixels, or (height, width).
    """

    parameters: int
    multiply_adds: int
    image_size: int | tuple[int, int]


def cost(model: nn.Module, image_size: int | tuple[int, int], in_chans: int = 3) -> Cost:
    """Count a network on the meta device, where nothing is computed.

    Args:
        model: any network whose operators have shape functions; it stays unchanged.
        image_size: side of the image in pixels, or (height, width).
        in_chans: channels of the image.

    Returns:
        Parameters, and multiply-adds of convolutions and matrix products for one image, padding included.

    Source: the counts of Ding et al. 2022, arXiv:2203.06717, Tables 5 and 6.
    """
    # it imports Triton
    from torch.utils.flop_counter import FlopCounterMode

    ghost = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        ghost(torch.empty(1, in_chans, height, width, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, image_size)
