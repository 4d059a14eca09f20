"""How the operator works on DTensors: sharded over images, or over channels."""

import sys
from collections.abc import Sequence
from functools import cache

from replknet.ops.schemas import computing, computing_backward

# of the results, and of the arguments; None for an argument that is no tensor
Placements = tuple[Sequence[object], Sequence[object]]


def know_sharded() -> None:
    """Tell DTensor once how our ops are sharded, if the program has imported it: the import takes a second."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@cache
def _register() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    everywhere, images, channels = Replicate(), Shard(0), Shard(1)
    # dimension 0 of a weight, a bias and their gradients is the channels
    kernels = Shard(0)

    @register_sharding(computing)
    def forward(x: object, weight: object, bias: object, relu: bool, algorithm: str) -> list[Placements]:
        def given(placement: object) -> object:
            return None if bias is None else placement

        return [
            ([everywhere], [everywhere, everywhere, given(everywhere), None, None]),
            ([images], [images, everywhere, given(everywhere), None, None]),
            ([channels], [channels, kernels, given(kernels), None, None]),
        ]

    @register_sharding(computing_backward)
    def backward(dy: object, x: object, weight: object, wanted: list[bool], algorithm: str) -> list[Placements]:
        return [
            ([everywhere] * 3, [everywhere, everywhere, everywhere, None, None]),
            ([images, Partial(), Partial()], [images, images, everywhere, None, None]),
            ([channels, kernels, kernels], [channels, channels, kernels, None, None]),
        ]
