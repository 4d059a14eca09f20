"""`accelerate` on timm's networks: same results, same parameters, everything told, and a way back."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import replknet
from replknet.nn import DepthwiseConv2d


@pytest.mark.parametrize(("name", "expected"), [("convnext_tiny", 18), ("mobilenetv2_050", 13)])
def test_timm_network_keeps_outputs_gradients_and_state(name, expected):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    y = model(x)
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, 0.1)
    report = replknet.accelerate(model)
    assert len(report.replaced) == expected
    assert sum(type(m) is DepthwiseConv2d for m in model.modules()) == expected
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    optimiser.step()
    assert all(p.grad is not None for p in model.parameters())
    assert str(report).startswith(f"{expected} convolutions run on the operator, ")

    changed = model(x)
    report.undo()
    assert not any(isinstance(m, DepthwiseConv2d) for m in model.modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-4)


class Subclass(nn.Conv2d):
    pass


def hooked():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    conv.register_forward_hook(lambda *_: None)
    return conv


def parametrized():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), "not depthwise"),
        (Subclass(4, 4, 3, padding=1, groups=4), "a subclass of nn.Conv2d (Subclass)"),
        (parametrized(), "a subclass of nn.Conv2d (ParametrizedConv2d)"),
        (hooked(), "has hooks"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), "reflect padding"),
        (nn.Conv2d(4, 4, 3, 2, padding=1, groups=4), "stride (2, 2)"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), "dilation (2, 2)"),
        (nn.Conv2d(4, 4, 4, padding=2, groups=4), "even kernel 4x4"),
        (nn.Conv2d(4, 4, 5, padding=1, groups=4), "padding (1, 1) with kernel 5x5"),
        (nn.Conv2d(4, 4, 1, groups=4), "1x1 kernel"),
    ],
    ids=str,
)
def test_what_stays_is_told_with_its_reason(conv, why):
    model = nn.Sequential(conv)
    report = replknet.accelerate(model)
    assert report.left == {"0": why}
    assert model[0] is conv
    assert f"1 {why}" in str(report)


def test_same_padding_shared_convolutions_and_a_second_call():
    conv = nn.Conv2d(4, 4, (5, 3), padding="same", groups=4)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv), "c": conv})
    report = replknet.accelerate(model)
    assert report.replaced == ["a", "c", "b.0"]
    assert model["a"] is model["c"] is model["b"][0]
    assert replknet.accelerate(model).replaced == []
    report.undo()
    assert model["a"] is model["c"] is model["b"][0] is conv


def test_a_bare_convolution_is_told():
    assert "no parent" in replknet.accelerate(nn.Conv2d(4, 4, 3, padding=1, groups=4)).left["(the model)"]


def test_an_algorithm_goes_to_layers_that_run_on_the_operator_already_and_back():
    model = timm.create_model("replknet_test")
    plain = [name for name, m in model.named_modules() if isinstance(m, DepthwiseConv2d)]
    report = replknet.accelerate(model, algorithm="direct")
    assert set(plain) <= set(report.changed)
    assert f"{len(report.changed)} were on the operator already and got another algorithm" in str(report)
    assert all(model.get_submodule(name).algorithm == "direct" for name in report.changed)
    # the merged form and the inference form go on with it
    merged = replknet.merge(model.eval())
    kernels = [m for m in merged.modules() if isinstance(m, DepthwiseConv2d) and m.kernel_size[0] > 3]
    assert {m.algorithm for m in kernels} == {"direct"}
    report.undo()
    assert all(model.get_submodule(name).algorithm == "auto" for name in plain)
    assert not replknet.accelerate(model).changed


def test_an_unknown_algorithm_is_named_with_the_known_ones():
    for call in (lambda: replknet.accelerate(nn.ReLU(), algorithm="fast"), lambda: DepthwiseConv2d(4, 3, algorithm="")):
        with pytest.raises(ValueError, match=r"algorithm must be one of auto, direct, fft, got '(fast)?'"):
            call()
