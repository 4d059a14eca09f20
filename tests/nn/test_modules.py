"""Modules on the operator: the same as torch's, in every form in which a module is run."""

import copy

import pytest
import torch
from torch import nn

from replknet.nn import ConvFFN, DepthwiseConv2d, DropPath, ReparamLargeKernelConv, RepLKBlock, stem
from replknet.nn.depthwise import StridedDepthwiseConv2d


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [7, (5, 9)], ids=str)
def test_depthwise_conv_loads_and_equals_nn_conv2d(kernel, bias):
    ours = DepthwiseConv2d(4, kernel, bias=bias)
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    theirs = nn.Conv2d(4, 4, kernel, padding=padding, groups=4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 11, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.extra_repr() == theirs.extra_repr()


def test_depthwise_conv_starts_like_nn_conv2d():
    torch.manual_seed(3)
    ours = DepthwiseConv2d(4, 7)
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 13])
def test_a_strided_depthwise_conv_is_nn_conv2d_in_the_same_dtype(kernel, dtype, autocast):
    ours = StridedDepthwiseConv2d(6, kernel, 2)
    # as folding a norm does
    ours.bias = nn.Parameter(torch.randn(6))
    exact = nn.Conv2d(6, 6, kernel, 2, kernel // 2, groups=6).double()
    exact.load_state_dict(ours.state_dict())
    if not autocast:
        ours = ours.to(dtype)
        exact.weight.data, exact.bias.data = ours.weight.detach().double(), ours.bias.detach().double()
    x = torch.randn(2, 6, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(x)
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn(y.shape).to(y.dtype)
    y.backward(g)
    exact(wide).backward(g.double())
    # values of up to about 5, rounded to the dtype's mantissa; in float16 and bfloat16 gradients are rounded once
    tolerance = 8 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), exact(wide), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.weight.grad.double(), exact.weight.grad, rtol=tolerance, atol=4 * tolerance)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(ours(x).double(), y.double(), rtol=tolerance, atol=tolerance)


def test_even_kernel_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"kernel sides must be odd, got 4x4; torch\.nn\.Conv2d takes even ones"):
        DepthwiseConv2d(4, 4)


def test_mixed_parity_cannot_merge():
    with pytest.raises(ValueError, match="kernels of 31 and 4 cannot merge: one side is odd and the other even"):
        ReparamLargeKernelConv(4, 31, 4)


def test_mixed_parity_is_refused_when_a_branch_was_exchanged():
    block = ReparamLargeKernelConv(4, 9, 5)
    block.small_conv.conv = nn.Conv2d(4, 4, 4, groups=4, bias=False)
    with pytest.raises(ValueError, match="kernels of 9 and 4 cannot merge"):
        block.fuse()


def test_small_kernel_larger_than_the_large_one():
    with pytest.raises(ValueError, match="small kernel must not be larger than the large one, got 5 and 3"):
        ReparamLargeKernelConv(4, 3, 5)


def test_stem_of_another_stride():
    with pytest.raises(ValueError, match="the stem's stride must be 4, 2 or 1, got 3"):
        stem(3, 8, 3)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3, 3)
    drop = DropPath(0.25)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(y[:, :1, :1, :1].expand_as(y), y)
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)
    assert repr(drop) == "DropPath(rate=0.25)"


@pytest.mark.parametrize("block", [RepLKBlock(6, 9, 7, 3), ConvFFN(6, 24)], ids=["large kernel", "ffn"])
def test_blocks_have_an_identity_shortcut(block):
    block = copy.deepcopy(block).eval()
    nn.init.zeros_(block.pw2.bn.weight)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(block(x), x)
