"""Winograd's method against the float64 convolution, within a bound that its own sums give."""

import pytest
import torch
from torch import nn

from replknet.deploy import winograd
from replknet.deploy.winograd import Winograd

# unit roundoff of float32
U = 2.0**-24


def exact(conv, x):
    bias = None if conv.bias is None else conv.bias.double()
    return nn.functional.conv2d(x.double(), conv.weight.double(), bias, padding=1)


def bound(conv, x):
    """Largest error of each output: all sums taken of absolute values, times the roundings that a value goes through.

    36 terms for the inputs' transform, one rounding of the kernel's, the channels of the product, 36 terms back, bias.
    """
    wide = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False).double().requires_grad_(False)
    wide.weight.copy_(conv.weight)
    absolute = Winograd(wide, "none")
    taps = torch.tensor(winograd._TAPS, dtype=torch.float64).abs()
    kernels = torch.einsum("ap,oipq,bq->aboi", taps, wide.weight.abs(), taps).flatten(0, 1)
    absolute.products = nn.ModuleList([winograd.Product(one, None, 1) for one in kernels])
    absolute.inputs, absolute.outputs = absolute.inputs.abs(), absolute.outputs.abs()
    sums = absolute(x.double().abs())
    roundings = 36 + 1 + conv.in_channels + 36 + 1
    return U * roundings * (sums + (0 if conv.bias is None else conv.bias.double().abs()[:, None, None]))


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (4, 4), (5, 3), (8, 16), (13, 30)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_it_is_the_convolution(size, bias):
    conv = nn.Conv2d(20, 24, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(2, 20, *size).contiguous(memory_format=torch.channels_last)
    y = Winograd(conv, "none")(x)
    assert y.shape == (2, 24, *size)
    assert ((y - exact(conv, x)).abs() <= bound(conv, x)).all()
    assert (y - exact(conv, x)).abs().max() > 0, "float32 cannot be exact"


@torch.inference_mode()
def test_strips_and_layouts_give_the_same(monkeypatch):
    conv, x = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 21, 17)
    whole = Winograd(conv, "relu")(x)
    monkeypatch.setattr(winograd, "_TILES", 1)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(Winograd(conv, "relu")(image), whole, rtol=1e-4, atol=1e-5)
    assert whole.min() == 0
    assert whole.max() > 0


@torch.inference_mode()
def test_large_values_far_away_do_not_leak():
    # an error is relative to what its tile sees, and tiles are six pixels wide
    conv, x = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 24, 24)
    y = Winograd(conv, "none")(x)
    x[:, :, 20, 20] = 1e6
    torch.testing.assert_close(Winograd(conv, "none")(x)[:, :, :16, :16], y[:, :, :16, :16], rtol=0, atol=1e-5)
