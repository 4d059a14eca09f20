"""Synchronised batch norms on two GPUs: what one process does with all images. Never run where there are fewer."""

import pytest
import timm
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import replknet  # noqa: F401  # registers the networks


def network(sync_bn):
    torch.manual_seed(0)
    return timm.create_model("replknet_test", sync_bn=sync_bn).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 64, 64, generator=generator, dtype=torch.double), torch.arange(8)


def one_of_two(rank, folder):
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(network(True).cuda(), device_ids=[rank])
    x, target = (t.chunk(2)[rank].cuda() for t in batch())
    torch.nn.functional.cross_entropy(model(x), target).backward()
    if rank == 0:
        grads = {name: p.grad.cpu() for name, p in model.module.named_parameters()}
        torch.save((grads, {name: b.cpu() for name, b in model.module.named_buffers()}), f"{folder}/found.pt")
    distributed.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_have_the_statistics_and_gradients_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    grads, buffers = torch.load(tmp_path / "found.pt", weights_only=True)
    model = network(False).cuda()
    x, target = (t.cuda() for t in batch())
    torch.nn.functional.cross_entropy(model(x), target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad.cpu(), rtol=1e-9, atol=1e-12, msg=name)
    for name, b in model.named_buffers():
        torch.testing.assert_close(buffers[name], b.cpu(), rtol=1e-9, atol=1e-12, msg=name)
