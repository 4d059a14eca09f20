"""Merging is exact within its bound, keeps its input, and works with every kind of norm."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from replknet import merge
from replknet.difference import largest_difference
from replknet.nn import DepthwiseConv2d, unfolded_norms
from replknet.nn.conv_bn import affine, is_batch_norm

BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}


def trained(name="replknet_test", **kwargs):
    """A network whose norms have statistics and weights as after training, in eval mode."""
    model = timm.create_model(name, **kwargs).eval()
    for norm in model.modules():
        if is_batch_norm(norm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.3, 3)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"small_kernel": None}, {"dw_ratio": 1.5}], ids=str)
def test_logits_stay_within_the_bound(kwargs, fold_bn, dtype):
    model = trained(**kwargs).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    y = model(x)
    merged = merge(model, fold_bn=fold_bn)
    assert largest_difference(y, merged(x))[1] < BOUND[dtype]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(model(x), y)
    # the operator stays, one large kernel a block
    large = [m for m in merged.modules() if isinstance(m, DepthwiseConv2d) and max(m.kernel_size) > 3]
    assert len(large) == 5


@pytest.mark.parametrize("fold_bn", [False, True])
def test_merging_twice_gives_an_equal_copy(fold_bn):
    once = merge(trained(), fold_bn=fold_bn)
    twice = merge(once, fold_bn=fold_bn)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert all(a is not b for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_a_model_built_in_the_merged_form_merges():
    # official code: AttributeError, since the branches are not there
    model = trained(small_kernel_merged=True)
    x = torch.randn(1, 3, 64, 64)
    assert largest_difference(model(x), merge(model)(x))[1] < BOUND[torch.float32]
    same = merge(model, fold_bn=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_merging_prints_nothing(capsys):
    # official code: a line a block
    merge(trained())
    assert capsys.readouterr() == ("", "")


def test_keys_are_the_official_ones():
    model = trained()
    merged, folded = merge(model, fold_bn=False), merge(model)
    block = "stages.0.blocks.0"
    assert f"{block}.large_kernel.lkb_origin.conv.weight" in model.state_dict()
    assert f"{block}.large_kernel.small_conv.bn.running_var" in model.state_dict()
    assert f"{block}.large_kernel.lkb_reparam.bias" in merged.state_dict()
    assert f"{block}.prelkb_bn.weight" in merged.state_dict()
    assert f"{block}.pw1.conv.bias" in folded.state_dict()
    assert not any("_bn." in key or ".bn." in key or "lkb_origin" in key for key in folded.state_dict())


def test_norms_without_a_linear_neighbour_stay_and_are_listed():
    assert unfolded_norms(merge(trained())) == ["norm"]
    backbone = trained(features_only=True, norm_intermediate_features=True)
    assert unfolded_norms(merge(backbone)) == [f"model.stages.{i}.norm" for i in range(4)]


def test_timm_reparameterizes_to_the_official_keys():
    model = trained()
    fused = reparameterize_model(model)
    assert fused.state_dict().keys() == merge(model, fold_bn=False).state_dict().keys()
    x = torch.randn(1, 3, 64, 64)
    assert largest_difference(model(x), fused(x))[1] < BOUND[torch.float32]


def frozen(model):
    """torchvision's norm with fixed statistics in place of every batch norm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = FrozenBatchNorm2d(child.num_features, child.eps)
                norm.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
                setattr(parent, name, norm)
    return model


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, frozen])
def test_other_norms_merge_like_batch_norm(convert):
    # official code: SyncBatchNorm was silently left unfused, since it is no subclass of BatchNorm2d
    model = trained()
    other = merge(convert(copy.deepcopy(model)))
    expected = merge(model)
    own, theirs = expected.state_dict(), other.state_dict()
    assert {k for k in own if "num_batches" not in k} == {k for k in theirs if "num_batches" not in k}
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_norm_without_affine_parameters():
    norm = nn.BatchNorm2d(3, affine=False).eval()
    nn.init.normal_(norm.running_mean)
    scale, shift = affine(norm)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm(x).double(), x * scale[:, None, None] + shift[:, None, None])


def test_branch_without_running_statistics_is_an_error():
    model = trained()
    model.stages[0].blocks[0].large_kernel.lkb_origin.bn = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match="cannot fold BatchNorm2d: it has no running statistics; train with"):
        merge(model)


def test_pre_norm_without_running_statistics_stays():
    model = trained()
    model.stages[0].blocks[0].prelkb_bn = nn.BatchNorm2d(8, track_running_stats=False)
    assert unfolded_norms(merge(model)) == ["stages.0.blocks.0.prelkb_bn", "norm"]


def test_sync_bn_is_a_choice_of_one_model():
    # official code: one model with SyncBN turned a module-wide switch on for all later ones
    synced = timm.create_model("replknet_test", sync_bn=True)
    plain = timm.create_model("replknet_test")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())
    # mmpretrain: the kind of norm did not reach every layer
    norms = {name for name, m in plain.named_modules() if is_batch_norm(m)}
    assert norms == {name for name, m in synced.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    # official code: the default was SyncBN, which failed without a GPU
    assert torch.isfinite(plain.train()(torch.randn(2, 3, 64, 64))).all()


def test_a_merged_network_still_trains_and_keeps_frozen_parameters_frozen():
    model = trained().requires_grad_(False)
    assert not any(p.requires_grad for p in merge(model).parameters())
    merged = merge(model.requires_grad_(True)).train()
    merged(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in merged.parameters())


def test_a_large_kernel_alone_merges():
    block = trained().stages[0].blocks[0].large_kernel
    x = torch.randn(1, 8, 12, 12)
    assert largest_difference(block(x), merge(block)(x))[1] < BOUND[torch.float32]
