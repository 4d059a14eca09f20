"""The operator on sharded tensors and under DistributedDataParallel: python sharded.py RANK PROCESSES STORE."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import conv2d
from torch.nn.parallel import DistributedDataParallel

from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d


def check(rank: int, processes: int, store: Path) -> None:
    """Placements and values of y, dx, dw and db: over images, over channels and replicated."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        torch.manual_seed(0)
        x, dy = torch.randn(4, 6, 9, 8), torch.randn(4, 6, 9, 8)
        weight, bias = torch.randn(6, 1, 5, 7), torch.randn(6)
        wanted = _sharded(processes, x, weight, bias, dy)
        module = DepthwiseConv2d(6, (5, 7))
        module.load_state_dict({"weight": weight, "bias": bias})
        parallel = DistributedDataParallel(module)
        parallel(x.chunk(processes)[rank]).relu().backward(dy.chunk(processes)[rank])
        torch.testing.assert_close(processes * module.weight.grad, wanted[1], rtol=1e-4, atol=1e-4)
    finally:
        distributed.destroy_process_group()


def _sharded(
    processes: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of the whole tensors, which those of the shards were compared with."""
    mesh = distributed.init_device_mesh("cpu", (processes,))

    def gradients(run, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = run(*leaves)
        given = distribute_tensor(dy, mesh, y.placements) if isinstance(y, DTensor) else dy
        return y, torch.autograd.grad(y, leaves, given)

    truth, wanted = gradients(lambda x, w, b: conv2d(x, w, b, padding=(2, 3), groups=6).relu(), x, weight, bias)
    images, channels, whole = Shard(0), Shard(1), Replicate()
    for where, kernels, result in ((images, whole, images), (channels, Shard(0), channels), (whole, whole, whole)):
        given = (distribute_tensor(x, mesh, [where]), *(distribute_tensor(t, mesh, [kernels]) for t in (weight, bias)))
        y, found = gradients(lambda x, w, b: depthwise_conv2d(x, w, b, relu=True), *given)
        assert y.placements == (result,), y.placements
        torch.testing.assert_close(y.full_tensor(), truth)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-4, atol=1e-4)
        without = depthwise_conv2d(given[0], given[1])
        torch.testing.assert_close(without.full_tensor(), conv2d(x, weight, padding=(2, 3), groups=6))
    return wanted


if __name__ == "__main__":
    check(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
