"""What the operator promises about signs, NaN, infinity and large values (docs/concepts.md, "Signs, NaN and range").

"direct" sums products as the definition has them, with zeros for the padding. "auto" may go through Fourier transforms,
whose error is relative to the norms of the channel.
"""

import pytest
import torch
from torch.nn.functional import conv2d

import replknet
from matrix import matrix
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

LARGEST = torch.finfo(torch.float32).max
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
# images and kernels for which the core has different loops: wide, narrow, several strips, kernels beyond the map
SHAPES = [
    ((1, 16, 30, 30), (5, 5)),
    ((1, 3, 14, 14), (27, 27)),
    ((2, 17, 7, 7), (13, 13)),
    ((2, 16, 9, 40), (7, 31)),
    ((1, 16, 56, 56), (31, 31)),
    ((1, 5, 4, 6), (13, 3)),
]
# the largest map costs as much as all others together
VALUES = [(*case, value) for case in SHAPES for value in (float("nan"), float("inf"), float("-inf"))]
SPOILT = pytest.mark.parametrize(
    ("shape", "kernel", "value"),
    matrix(VALUES, [case for case in VALUES if case[0][2:] != (56, 56) or case[2] == float("inf")]),
    ids=str,
)


def results(run, x, weight, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = run(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def direct(x, weight):
    return depthwise_conv2d(x, weight, algorithm="direct")


def torchs(x, weight):
    return conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])


def kinds(t):
    """0 for a number, 1 and 2 for the infinities, 3 for NaN."""
    return t.isinf() * (1 + (t > 0).int()) + 3 * t.isnan()


def sample(shape, kernel, layout, dtype=torch.float32):
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    return x, torch.randn(shape[1], 1, *kernel).to(dtype), dy


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "kernel"), SHAPES, ids=str)
def test_direct_gives_no_negative_value_for_non_negative_ones(shape, kernel, dtype, layout):
    x, weight, dy = (t.abs() for t in sample(shape, kernel, layout, dtype))
    # most values are zero, where a rounding error would show
    x, dy = (t * (torch.rand(shape) < 0.1) for t in (x, dy))
    weight = weight * (torch.rand(weight.shape) < 0.1)
    for t in results(direct, x, weight, dy):
        assert (t >= 0).all()
    assert not depthwise_conv2d(x, weight, algorithm="direct").sqrt().isnan().any()


@LAYOUTS
@SPOILT
def test_direct_has_nan_and_infinity_exactly_where_torch_has_them(shape, kernel, value, layout):
    for row, column in ((0, 0), (shape[2] // 2, shape[3] // 2), (shape[2] - 1, 1)):
        x, weight, dy = sample(shape, kernel, layout)
        x[0, 2, row, column] = value
        for got, want in zip(results(direct, x, weight, dy), results(torchs, x, weight, dy), strict=True):
            assert torch.equal(kinds(got), kinds(want))


@LAYOUTS
@SPOILT
def test_direct_has_none_of_weights_and_gradients_beyond_torchs(shape, kernel, value, layout):
    """A product of the padding with infinity is NaN: torch's convolution makes some of these in the contiguous layout,
    ours none."""
    for row, column in ((0, 0), (kernel[0] // 2, kernel[1] // 2), (kernel[0] // 2, 0)):
        for spoilt in ("weight", "dy"):
            x, weight, dy = sample(shape, kernel, layout)
            if spoilt == "weight":
                weight[2, 0, row, column] = value
            else:
                dy[0, 1, min(row, shape[2] - 1), min(column, shape[3] - 1)] = value
            for got, want in zip(results(direct, x, weight, dy), results(torchs, x, weight, dy), strict=True):
                assert (kinds(want)[kinds(got) > 0] > 0).all()
            if spoilt == "weight":
                seen = direct(x, torch.ones_like(weight) * ~weight.isfinite())
                last = results(torchs, x, weight, dy)[0] if layout is torch.channels_last else None
                assert (kinds(direct(x, weight)) > 0)[seen != 0].all()
                assert last is None or torch.equal(kinds(direct(x, weight)), kinds(last))


@LAYOUTS
@pytest.mark.parametrize(("shape", "kernel"), SHAPES, ids=str)
def test_direct_is_finite_as_long_as_the_sums_of_magnitudes_are(shape, kernel, layout):
    x, weight, dy = sample(shape, kernel, layout)
    magnitudes = results(torchs, x.double().abs(), weight.double().abs(), dy.double().abs())
    scale = 0.99 * LARGEST / max(t.max() for t in magnitudes[:2])
    y, dx, _ = results(direct, (x * scale).float(), weight, (dy * scale).float())
    assert y.isfinite().all()
    assert dx.isfinite().all()
    torch.testing.assert_close(y, torchs(x.double() * scale, weight.double()).float(), rtol=1e-4, atol=1e-5 * LARGEST)


@LAYOUTS
def test_transforms_are_finite_up_to_the_stated_range_and_wrong_relative_to_the_norms(layout):
    """Sums of magnitudes of a channel's image and kernel whose product is up to 1e37."""
    x, weight, _ = sample((2, 16, 56, 56), (31, 31), layout)
    sums = x.abs().sum((2, 3), keepdim=True) * weight.abs().sum((2, 3)).reshape(1, -1, 1, 1)
    x = x * (1e37 / sums)
    y = depthwise_conv2d(x, weight, algorithm="fft")
    assert y.isfinite().all()
    error = (y.double() - torchs(x.double(), weight.double())).abs().amax((2, 3))
    norms = x.double().norm(dim=(2, 3)) * weight.double().norm(dim=(2, 3)).reshape(1, -1)
    assert (error < 1e-6 * norms).all()


def test_nan_by_transforms_stays_in_its_image_and_channel():
    x, weight = torch.randn(2, 16, 30, 30), torch.randn(16, 1, 21, 21)
    x[0, 3, 10, 10], x[1, 5, 0, 0] = float("nan"), float("inf")
    y = depthwise_conv2d(x, weight, algorithm="fft")
    assert y[0, 3].isnan().all()
    assert not y[1, 5].isfinite().any()
    y[0, 3] = y[1, 5] = 0
    assert y.isfinite().all()


def test_a_module_and_a_network_take_the_algorithm():
    """The case of the guarantee: a square root after a large kernel on non-negative values."""
    x, weight = torch.rand(1, 16, 56, 56) * (torch.rand(1, 16, 56, 56) < 0.01), torch.rand(16, 1, 31, 31)
    weight = weight * (torch.rand(weight.shape) < 0.01)
    conv = DepthwiseConv2d(16, 31, bias=False, algorithm="direct")
    conv.load_state_dict({"weight": weight})
    assert not conv(x).sqrt().isnan().any()
    assert "algorithm=direct" in repr(conv)
    conv.algorithm = "fft"
    assert (conv(x) < 0).any()

    network = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 31, padding=15, groups=16, bias=False), torch.nn.ReLU())
    network[0].load_state_dict({"weight": weight})
    report = replknet.accelerate(network, algorithm="direct")
    assert network[0].algorithm == "direct"
    assert torch.equal(network(x), depthwise_conv2d(x, weight, algorithm="direct"))
    report.undo()
    assert type(network[0]) is torch.nn.Conv2d
