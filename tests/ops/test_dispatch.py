"""The operator is an ordinary one for torch: whoever looks at calls, changes or batches tensors, sees ours, too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import sharded
from matrix import FULL
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

OP = torch.ops.replknet.depthwise_conv2d
GRADIENTS = torch.ops.replknet.depthwise_conv2d_backward
COMPUTING = torch.ops.replknet._depthwise_conv2d
COMPUTING_GRADIENTS = torch.ops.replknet._depthwise_conv2d_backward


def by_name(x, weight, bias=None, relu=False, algorithm="auto"):
    return OP(x, weight, bias, relu, algorithm)


ROADS = pytest.mark.parametrize("call", [depthwise_conv2d, by_name], ids=["function", "op"])


def expected(x, weight, bias=None, relu=False):
    y = conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])
    return y.relu() if relu else y


def sample(dtype=torch.float64, grad=False):
    x, weight = torch.randn(2, 3, 6, 5, dtype=dtype), torch.randn(3, 1, 3, 5, dtype=dtype)
    return x.requires_grad_(grad), weight.requires_grad_(grad), torch.randn(3, dtype=dtype).requires_grad_(grad)


@ROADS
def test_gradients_of_many_results_at_once(call):
    arguments = sample(grad=True)
    y, truth = call(*arguments, relu=True), expected(*arguments, relu=True)
    dy = torch.randn(4, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, arguments, dy, is_grads_batched=True)
    for one, want in zip(got, torch.autograd.grad(truth, arguments, dy, is_grads_batched=True), strict=True):
        torch.testing.assert_close(one, want)


@ROADS
def test_vectorised_jacobian_and_hessian(call):
    x, weight, _ = sample()
    for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        got = function(lambda x, w: call(x, w).pow(2).sum(), (x, weight), vectorize=True)
        want = function(lambda x, w: expected(x, w).pow(2).sum(), (x, weight), vectorize=True)
        torch.testing.assert_close(got, want)


@ROADS
def test_gradcheck_with_batched_gradients(call):
    assert gradcheck(lambda *a: call(*a, relu=True), sample(grad=True), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, sample(grad=True), check_batched_grad=True, fast_mode=True)


@ROADS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tensors_that_are_negated_when_read(call, dtype):
    x, weight, bias = sample(dtype)
    for lazy in (torch.imag(torch.complex(x, -x).conj()), torch._neg_view(x)):
        assert lazy.is_neg()
        torch.testing.assert_close(call(lazy, weight, bias), expected(lazy.resolve_neg(), weight, bias))
    torch.testing.assert_close(call(x, torch._neg_view(weight)), expected(x, -weight))
    got = GRADIENTS(torch._neg_view(x), x, weight, [True, True, True], "auto")
    for one, want in zip(got, GRADIENTS(-x, x, weight, [True, True, True], "auto"), strict=True):
        torch.testing.assert_close(one, want)


@ROADS
def test_tensors_of_zeros_without_memory(call):
    x, weight, bias = sample()
    zero = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    torch.testing.assert_close(call(zero, weight, bias), bias[:, None, None].expand(x.shape).contiguous())
    assert call(x, torch._efficientzerotensor(weight.shape, dtype=x.dtype)).eq(0).all()


@ROADS
def test_forward_mode_has_the_tangent_of_every_argument(call):
    arguments, tangents = sample(), sample()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(arguments, tangents, strict=True)]
        got, want = (forward_ad.unpack_dual(run(*duals, relu=True)).tangent for run in (call, expected))
    torch.testing.assert_close(got, want)
    assert want.abs().sum() > 0


@ROADS
def test_forward_mode_through_the_gradient(call):
    x, weight, _ = sample(grad=True)
    y, truth = call(x, weight), expected(x, weight)
    dy, tangent = torch.randn_like(y), torch.randn_like(y)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, tangent)
        for got, want in zip(
            torch.autograd.grad(y, (x, weight), dual), torch.autograd.grad(truth, (x, weight), dual), strict=True
        ):
            torch.testing.assert_close(forward_ad.unpack_dual(got).tangent, forward_ad.unpack_dual(want).tangent)


@ROADS
def test_forward_over_reverse(call):
    arguments = sample(grad=True)
    assert gradcheck(call, arguments, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        call, arguments, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@ROADS
@pytest.mark.parametrize(
    "transform", ["grad", "jvp", "vjp", "vmap", "jacrev", "jacfwd", "grad of vmap", "vmap of grad"]
)
def test_transforms_of_torch_func(call, transform):
    x, weight, _ = sample()
    many = torch.stack([x, 2 * x, -x])

    def run(call):
        def loss(x, w):
            return call(x, w, relu=True).pow(2).sum()

        func = torch.func
        return {
            "grad": lambda: func.grad(loss, (0, 1))(x, weight),
            "jvp": lambda: func.jvp(call, (x, weight), (x, weight)),
            "vjp": lambda: func.vjp(call, x, weight)[1](x),
            "vmap": lambda: func.vmap(call, (0, None))(many, weight),
            "jacrev": lambda: func.jacrev(call)(x, weight),
            "jacfwd": lambda: func.jacfwd(call)(x, weight),
            "grad of vmap": lambda: func.grad(lambda w: func.vmap(loss, (0, None))(many, w).sum())(weight),
            "vmap of grad": lambda: func.vmap(func.grad(loss), (0, None))(many, weight),
        }[transform]()

    torch.testing.assert_close(run(call), run(expected))


@ROADS
def test_transforms_of_a_compiled_call(call):
    x, weight, _ = sample()
    gradient = torch.compile(torch.func.grad(lambda x: call(x, weight).pow(3).sum()), fullgraph=True)
    torch.testing.assert_close(gradient(x), torch.func.grad(lambda x: expected(x, weight).pow(3).sum())(x))


def test_what_autograd_passes_by_refuses_to_lose_a_derivative():
    x, weight, _ = sample(grad=True)
    for call in (
        lambda x: COMPUTING(x, weight, None, False, "auto"),
        lambda x: COMPUTING_GRADIENTS(x, x, weight, [True, True, True], "auto"),
    ):
        with pytest.raises(RuntimeError, match=r"has no derivative; call replknet\.ops\.depthwise_conv2d, or the op"):
            call(x)
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivative"):
            call(forward_ad.make_dual(x, x))


class Seen(TorchDispatchMode):
    """The names of the ops below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.name()))
        return func(*args, **(kwargs or {}))


@ROADS
def test_modes_see_the_op_and_its_gradients(call):
    x, weight, _ = sample(torch.float32, grad=True)
    with Seen() as seen:
        call(x, weight).sum().backward()
    assert [name for name in seen.names if name.startswith("replknet")] == [
        "replknet::_depthwise_conv2d",
        "replknet::_depthwise_conv2d_backward",
    ]


def test_profilers_see_the_op_and_its_gradients():
    x, weight, _ = sample(torch.float32, grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        depthwise_conv2d(x, weight).sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {"replknet::_depthwise_conv2d", "replknet::_depthwise_conv2d_backward", "_RecordedBackward"} <= names


class Wrapped(torch.Tensor):
    """A subclass that torch asks first."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += getattr(func, "__name__", "").startswith("_depthwise_conv2d")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_of_tensors_are_asked_and_kept():
    x, weight, _ = sample(torch.float32)
    y = depthwise_conv2d(x.as_subclass(Wrapped), weight)
    assert type(y) is Wrapped
    assert Wrapped.calls == 1
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 1, 40, 41)}, "kernel sides must be odd, got 40x41"),
        ({"weight": torch.zeros(2, 1, 3, 3)}, r"weight must be \[3,1,Kh,Kw\]"),
        ({"weight": torch.zeros(3, 1, 3, 3).half()}, "weight must have the dtype of x"),
        (
            {"dy": torch.zeros(2, 3, 9, 9)},
            r"dy must have the shape, dtype and device of x, \[2, 3, 4, 4\] .* got \[2, 3, 9, 9\] torch.float32 on cpu",
        ),
        ({"algorithm": "winograd"}, "algorithm must be one of auto, direct, fft, got 'winograd'"),
    ],
    ids=["even", "channels", "dtype", "dy", "algorithm"],
)
def test_ops_called_by_name_check_their_arguments(change, message):
    """The core reads raw memory: an argument that does not fit must not reach it."""
    given = {"x": torch.zeros(2, 3, 4, 4), "dy": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(3, 1, 3, 3)}
    given |= {"algorithm": "auto"} | change
    x, dy, weight, algorithm = (given[name] for name in ("x", "dy", "weight", "algorithm"))
    for gradients in (GRADIENTS, COMPUTING_GRADIENTS):
        with pytest.raises(ValueError, match=message):
            gradients(dy, x, weight, [True, True, True], algorithm)
    for forward in (OP, COMPUTING) if "dy" not in change else ():
        with pytest.raises(ValueError, match=message):
            forward(x, weight, None, False, algorithm)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_saved_with_the_first_version_runs_and_learns():
    """`torch.export` of both public ops, saved by replknet 0.1 of 2026-11-29 on torch 2.14."""
    program = torch.export.load(Path(__file__).parent / "data" / "operator_0.1.pt2")
    module, x = program.module(), torch.randn(3, 3, 8, 9, requires_grad=True)
    weight, bias = module.weight, module.bias
    y, *gradients = module(x)
    truth = expected(x, weight, bias, relu=True)
    torch.testing.assert_close(y, truth)
    convolved = expected(x, weight)
    want = torch.autograd.grad(convolved, (x, weight), truth.detach(), retain_graph=True)
    for got, one in zip(gradients, (*want, truth.sum((0, 2, 3))), strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(y.pow(2).sum(), (x, weight, bias))
    for one, want in zip(got, torch.autograd.grad(truth.pow(2).sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)


def test_sharded_tensors_and_ddp_in_one_process(tmp_path):
    sharded.check(0, 1, tmp_path / "store")


@FULL
def test_sharded_tensors_and_ddp_in_two_processes(tmp_path):
    """Over images, over channels and replicated: placements and values of y, dx, dw and db."""
    command = [sys.executable, "-W", "ignore", sharded.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_the_module_takes_part_in_all_of_it():
    module, x = DepthwiseConv2d(3, 5).double(), sample()[0]
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(module, p, (x[None],)).sum()), (None, 0)
    )(dict(module.named_parameters()), x)
    assert per_sample["weight"].shape == (2, 3, 1, 5, 5)
    torch.testing.assert_close(per_sample["bias"], torch.full((2, 3), 30.0, dtype=x.dtype))
