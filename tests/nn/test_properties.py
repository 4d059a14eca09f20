"""Whatever its sizes and statistics, a merged module gives what its branches give, and leaves them as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from replknet import merge
from replknet.nn import RepLKBlock
from replknet.nn.conv_bn import is_batch_norm
from replknet.nn.reparam import ReparamLargeKernelConv

BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}
ODD = st.sampled_from((1, 3, 5, 7, 13))


@st.composite
def branches(draw):
    """A large kernel with or without a small one, a stride or a dilation."""
    kernel, stride = draw(ODD), draw(st.sampled_from((1, 1, 2)))
    small = draw(st.one_of(st.none(), ODD.filter(lambda side: side <= kernel)))
    dilation = 1 if small is not None else draw(st.sampled_from((1, 2)))
    return ReparamLargeKernelConv(draw(st.integers(1, 18)), kernel, small, stride=stride, dilation=dilation)


@st.composite
def blocks(draw):
    kernel = draw(ODD)
    small = draw(st.one_of(st.none(), ODD.filter(lambda side: side <= kernel)))
    return RepLKBlock(draw(st.integers(1, 9)), draw(st.integers(1, 18)), kernel, small)


def fill(module, generator):
    """Weights and statistics as after a training, negative scales among them."""
    for one in module.modules():
        if is_batch_norm(one):
            for t, low, high in ((one.weight, -1.5, 1.5), (one.running_var, 0.3, 3), (one.running_mean, -1, 1)):
                nn.init.uniform_(t, low, high, generator=generator)
            nn.init.normal_(one.bias, generator=generator)
        elif isinstance(one, nn.Conv2d):
            nn.init.normal_(one.weight, std=one.weight[0].numel() ** -0.5, generator=generator)


@settings(max_examples=40)
@given(
    module=st.one_of(branches(), blocks()),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(list(BOUND)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("way", ["fuse", "merge"])
def test_a_merged_module_gives_what_its_branches_give_and_leaves_them_alone(way, module, size, dtype, seed):
    if way == "fuse" and isinstance(module, RepLKBlock):
        module = module.large_kernel
    generator = torch.Generator().manual_seed(seed)
    fill(module, generator)
    module = module.to(dtype).eval()
    channels = next(module.parameters()).shape[0]
    x = torch.randn(2, channels, *size, generator=generator).to(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    children = [(name, type(child)) for name, child in module.named_modules()]
    with torch.no_grad():
        y = module(x)
        merged = module.fuse() if way == "fuse" else merge(module)
        # sums of about one a value may cancel in y
        assert (y - merged(x)).norm() < BOUND[dtype] * (y.norm() + y.numel() ** 0.5)
        large = [one for one in merged.modules() if isinstance(one, ReparamLargeKernelConv)]
        assert all(one.lkb_origin is None and one.small_conv is None for one in large)
        # untouched: the same children with the same values and the same result
        assert [(name, type(child)) for name, child in module.named_modules()] == children
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
        assert torch.equal(module(x), y)
