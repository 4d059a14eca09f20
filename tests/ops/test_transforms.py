"""The few names of torch that it does not document: that they are there, and what happens where they are not."""

import pytest
import torch
from torch.autograd import forward_ad

from replknet.ops import depthwise_conv2d, transforms

SAMPLE = torch.randn(2, 3, 6, 5), torch.randn(3, 1, 3, 5)


def test_this_torch_has_the_names():
    assert transforms._functorch_is_active is not None, f"torch {torch.__version__} has no name for functorch's state"
    assert not transforms._functorch_is_active()
    assert torch.vmap(lambda x: x + transforms._functorch_is_active())(torch.zeros(2)).eq(1).all()
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0


def test_this_torch_has_the_key_that_transforms_ask_first():
    for name in ("depthwise_conv2d", "_depthwise_conv2d", "depthwise_conv2d_backward", "_depthwise_conv2d_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"replknet::{name}", "FuncTorchDynamicLayerFrontMode")


def test_forward_mode_is_right_without_its_name(monkeypatch):
    x, weight = SAMPLE
    monkeypatch.delattr(forward_ad, "_current_level")
    # torch itself needs the name, so the question is asked of a stand-in
    tangent = torch.ones_like(x)
    monkeypatch.setattr(
        forward_ad, "unpack_dual", lambda t: forward_ad.UnpackedDualTensor(t, tangent if t is x else None)
    )
    assert transforms.differentiates_forward(x, weight)
    assert transforms.differentiates_forward(weight, None, x)
    assert not transforms.differentiates_forward(weight, None)


def test_transforms_are_right_or_raise_without_the_name(monkeypatch):
    x, weight = SAMPLE
    monkeypatch.setattr(transforms, "_functorch_is_active", None)
    many = torch.stack([x, -x])
    torch.testing.assert_close(
        torch.vmap(lambda x: depthwise_conv2d(x, weight))(many),
        torch.stack([depthwise_conv2d(x, weight) for x in many]),
    )
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: depthwise_conv2d(x, weight).sum())(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated")
def test_what_is_plain():
    x, _ = SAMPLE
    seen = []

    def ask(x):
        seen.append(transforms.must_be_plain(x))
        return x * 2

    ask(x)
    torch.vmap(ask)(x)
    torch.jit.trace(ask, x, check_trace=False)
    with forward_ad.dual_level():
        ask(x)
    ask(x)
    assert seen == [False, True, True, True, False]
