"""The public operator: its contract with torch, its gradients of every order, and its errors."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

import replknet
from replknet import kernels
from replknet.kernels import native
from replknet.ops import depthwise_conv2d

OP = torch.ops.replknet.depthwise_conv2d.default
GRADIENTS = torch.ops.replknet.depthwise_conv2d_backward.default
COMPUTING = torch.ops.replknet._depthwise_conv2d.default
COMPUTING_GRADIENTS = torch.ops.replknet._depthwise_conv2d_backward.default


def sample(n=2, c=3, h=7, w=9, kh=5, kw=11, dtype=torch.float64, grad=True):
    x = torch.randn(n, c, h, w, dtype=dtype, requires_grad=grad)
    weight = torch.randn(c, 1, kh, kw, dtype=dtype, requires_grad=grad)
    return x, weight, torch.randn(c, dtype=dtype, requires_grad=grad)


def expected(x, weight, bias=None, relu=False):
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_it_is_torchs_convolution(use_bias, relu):
    x, weight, bias = sample()
    bias = bias if use_bias else None
    torch.testing.assert_close(depthwise_conv2d(x, weight, bias, relu), expected(x, weight, bias, relu))


@pytest.mark.parametrize("relu", [False, True])
def test_first_and_second_derivatives(relu):
    arguments = sample(h=4, w=5, kh=3, kw=7)
    assert gradcheck(lambda *a: depthwise_conv2d(*a, relu=relu), arguments)
    assert gradgradcheck(lambda *a: depthwise_conv2d(*a, relu=relu), arguments)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_second_derivatives_with_one_gradient_wanted(needs):
    arguments = [t.requires_grad_(need) for t, need in zip(sample(h=4, w=3, kh=3, kw=5), needs, strict=True)]
    assert gradgradcheck(depthwise_conv2d, arguments)


def test_third_derivative():
    x, weight, _ = sample(n=1, c=1, h=3, w=3, kh=3, kw=3)

    def penalty(x, weight):
        (gx,) = torch.autograd.grad(depthwise_conv2d(x, weight).pow(3).sum(), x, create_graph=True)
        return gx

    assert gradgradcheck(penalty, (x, weight))


def layouts(x):
    """x in all the memory layouts that opcheck and users produce."""
    n, c, h, w = x.shape
    last = torch.channels_last
    wide = torch.nn.functional.pad(x, (1, 2, 1, 0, 2, 1)).contiguous(memory_format=last)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.nn.functional.pad(x, (1, 2, 1, 0))[:, :, 1:, 1 : 1 + w],
        "channels of channels_last": wide[:, 2 : 2 + c, 1:, 1 : 1 + w],
        "every second pixel": x.repeat_interleave(2, 3).contiguous(memory_format=last)[..., ::2],
        "every second channel": x.repeat_interleave(2, 1).contiguous(memory_format=last)[:, ::2],
        "expanded": x[:1].expand(n, c, h, w),
        "expanded channels_last": x[:1].contiguous(memory_format=last).expand(n, c, h, w),
        "expanded channels": x[:, :1].expand(n, c, h, w),
        "one channel": x[:, :1],
        "one channel, channels_last": x[:, :1].contiguous(memory_format=last),
        "one pixel": x[:, :, :1, :1].contiguous(),
        "one pixel, channels_last": x[:, :, :1, :1].contiguous(memory_format=last),
        "one row, channels_last": x[:, :, :1].contiguous(memory_format=last),
        "one value": x[:, :1, :1, :1].contiguous(),
        "one image, channels_last": x[:1].contiguous(memory_format=last),
        "images last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


LAYOUTS = list(layouts(torch.zeros(2, 3, 4, 5)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients_have_the_layout_that_torchs_own_have(layout, dtype):
    x, weight, _ = sample(dtype=dtype, kh=3, kw=3)
    x = layouts(x.detach())[layout].requires_grad_()
    weight = weight[: x.shape[1]]
    y, truth = depthwise_conv2d(x, weight), expected(x, weight)
    assert y.stride() == truth.stride(), x.stride()
    torch.testing.assert_close(y, truth)
    # whatever the layout of the gradient that comes
    for dy in (torch.ones_like(y), torch.ones(1, dtype=dtype).expand(y.shape)):
        (dx,) = torch.autograd.grad(depthwise_conv2d(x, weight), x, dy)
        assert dx.stride() == y.stride()


def test_a_slice_of_channels_is_not_brought_into_the_other_layout(monkeypatch):
    seen = []
    original = native.BACKEND.forward
    spy = replace(native.BACKEND, forward=lambda x, *rest: seen.append(x.stride()) or original(x, *rest))
    monkeypatch.setattr(kernels, "BACKENDS", (spy, *kernels.BACKENDS[1:]))
    x = torch.randn(1, 48, 20, 20).contiguous(memory_format=torch.channels_last)
    y = depthwise_conv2d(x[:, 8:24], torch.randn(16, 1, 7, 7))
    assert seen == [(6400, 1, 320, 16)]
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, dtype):
    x, weight, bias = sample(dtype=dtype, grad=False)
    x = layouts(x)[layout]
    weight, bias = weight[: x.shape[1]], bias[: x.shape[1]]
    dy = torch.randn(x.shape).to(dtype)
    # autograd registration and AOT dispatch compare gradients with a tolerance for float32 only, and take seconds
    whole = dtype == torch.float32 and layout in ("contiguous", "channels_last", "channels of channels_last")
    tests = ("test_schema", "test_faketensor") + (
        ("test_autograd_registration", "test_aot_dispatch_dynamic") if whole else ()
    )
    for op, gradients in ((COMPUTING, COMPUTING_GRADIENTS), (OP, GRADIENTS)):
        torch.library.opcheck(op, (x, weight, bias, True, "auto"), test_utils=tests)
        torch.library.opcheck(gradients, (dy, x, weight, [True, True, False], "auto"), test_utils=tests)
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.to(memory_format=torch.channels_last)])
def test_gradient_has_the_layout_of_x(make):
    x, weight, _ = sample()
    x = make(x.detach()).requires_grad_()
    depthwise_conv2d(x, weight).sum().backward()
    assert x.grad.stride() == x.stride()


def test_batch_of_none():
    x, weight, bias = sample(n=0)
    y = depthwise_conv2d(x, weight, bias)
    assert y.shape == x.shape
    y.sum().backward()
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()


def test_compiles_without_a_graph_break_and_in_both_directions():
    x, weight, bias = sample(dtype=torch.float32)
    step = torch.compile(lambda *a: depthwise_conv2d(*a, relu=True), fullgraph=True)
    y, truth = step(x, weight, bias), expected(x, weight, bias, relu=True)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, weight, bias), dy),
        torch.autograd.grad(truth, (x, weight, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_double_backward_under_compile_is_refused_by_torch():
    x, weight, _ = sample(dtype=torch.float32)
    y = torch.compile(lambda x: depthwise_conv2d(x, weight).pow(2), fullgraph=True, backend="aot_eager")(x)
    (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"torch\.compile with aot_autograd does not currently support double backward"
    ):
        gx.sum().backward()


def test_forward_mode_is_right():
    x, weight, bias = sample(grad=False)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        y = depthwise_conv2d(forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected(tangent, weight))


def test_functorch_grad_jvp_and_hessian_vector_product():
    x, weight, _ = sample(h=4, w=4, kh=3, kw=3, grad=False)
    tangent = torch.randn_like(x)

    def loss(x):
        return depthwise_conv2d(x, weight).pow(3).sum()

    def truth(x):
        return expected(x, weight).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(truth)(x))
    for got, want in zip(
        torch.func.jvp(torch.func.grad(loss), (x,), (tangent,)),
        torch.func.jvp(torch.func.grad(truth), (x,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 1)])
def test_vmap_equals_a_loop(dims):
    many = [torch.randn(4, 2, 3, 6, 5), torch.randn(4, 3, 1, 3, 5)]
    moved = [many[i].movedim(0, d) if d is not None else many[i][0] for i, d in enumerate(dims)]
    got = torch.vmap(depthwise_conv2d, in_dims=dims)(*moved)
    loop = [
        depthwise_conv2d(*(many[j][i] if d is not None else many[j][0] for j, d in enumerate(dims))) for i in range(4)
    ]
    torch.testing.assert_close(got, torch.stack(loop))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_the_arguments_and_gives_float32_gradients(dtype):
    x, weight, bias = sample(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = depthwise_conv2d(x, weight, bias)
        assert y.dtype == dtype
        y.float().pow(2).sum().backward()
    low = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    z = depthwise_conv2d(*low)
    assert torch.equal(y, z)
    z.float().pow(2).sum().backward()
    for high, t in zip((x, weight, bias), low, strict=True):
        assert high.grad.dtype == torch.float32
        assert torch.equal(high.grad, t.grad.float())


def test_autocast_leaves_float64_alone():
    x, weight, _ = sample()
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv2d(x, weight).dtype == torch.float64


def test_autocast_under_compile():
    x, weight, bias = sample(dtype=torch.float32, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")(x, weight, bias)
        assert torch.equal(y, depthwise_conv2d(x, weight, bias))


def test_activation_checkpointing_and_inference_mode():
    x, weight, _ = sample()
    y = torch.utils.checkpoint.checkpoint(depthwise_conv2d, x, weight, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected(x, weight).sum(), x)[0])
    with torch.inference_mode():
        torch.testing.assert_close(depthwise_conv2d(x, weight), expected(x, weight))


def flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_flops_are_counted_as_torch_counts_a_convolution():
    x, weight, _ = sample(dtype=torch.float32)
    assert flops(depthwise_conv2d, x, weight) == flops(expected, x, weight) == 2 * x.numel() * 5 * 11
    # torch counts a grouped convolution's weight gradient C times over, so the sum is checked by hand
    assert flops(lambda: depthwise_conv2d(x, weight).sum().backward()) == 3 * 2 * x.numel() * 5 * 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be \[N,C,H,W\], got 3 dimensions \[3, 4, 4\]; x\[None\] adds"),
        ({"weight": torch.zeros(2, 1, 3, 3)}, r"weight must be \[3,1,Kh,Kw\].*got \[2, 1, 3, 3\]"),
        ({"weight": torch.zeros(3, 3, 3, 3)}, r"weight must be \[3,1,Kh,Kw\].*got \[3, 3, 3, 3\]"),
        ({"weight": torch.zeros(3, 1, 4, 3)}, "kernel sides must be odd, got 4x3; torch.nn.Conv2d takes"),
        ({"x": torch.zeros(2, 3, 0, 4)}, r"x must have at least one pixel, got \[2, 3, 0, 4\]"),
        ({"bias": torch.zeros(2)}, r"bias must be \[3\], one value a channel, got \[2\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "x must be float64, .* got torch.int32"),
        ({"weight": torch.zeros(3, 1, 3, 3).double()}, "weight must have the dtype of x, torch.float32, got"),
        ({"bias": torch.zeros(3).half()}, "bias must have the dtype of x, torch.float32, got torch.float16"),
        (
            {"weight": torch.zeros(3, 1, 3, 3, device="meta")},
            "weight must be on the device of x, cpu, got meta",
        ),
        ({"algorithm": "winograd"}, "algorithm must be one of auto, direct, fft, got 'winograd'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_error_says_what_was_expected_and_what_came(change, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3, 1, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**arguments)


def test_an_algorithm_that_no_backend_has_is_an_error():
    with pytest.raises(RuntimeError, match="no backend takes this call"):
        depthwise_conv2d(torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 1, 3, 3).double(), algorithm="fft")


def test_doctor_tells_who_takes_what():
    report = replknet.doctor()
    assert report.versions["replknet"] == replknet.__version__
    assert {check.backend for check in report.checks} == {"native"}
    assert "kernel 31x31" in str(report)
    assert report.asdict()["forced"] is None
    with replknet.use_backend("reference"):
        assert {check.backend for check in replknet.doctor().checks} == {"reference"}
