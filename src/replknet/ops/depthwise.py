"""The public operator: checks, `torch.library` ops, gradients of every order, autocast and cost.

The two schemas are fixed: a change would break saved `.pt2` files.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import conv2d
from torch.utils.flop_counter import register_flop_formula

from replknet.kernels import ALGORITHMS, Algorithm, Call, choose, prepared

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, algorithm: Algorithm = "auto"
) -> Tensor:
    """Depthwise convolution with a large odd kernel: stride 1, zero padding that keeps the size.

    Equal to `conv2d(x, weight, bias, padding=(Kh // 2, Kw // 2), groups=C)`, optionally followed by a ReLU.
    Differentiable to any order in eager mode. Under autocast the arguments are cast to the autocast dtype.
    While a model is exported or traced, and under forward-mode AD and `torch.func` transforms, the call is
    torch's own convolution.

    Args:
        x: images `[N,C,H,W]`, float64, float32, float16 or bfloat16; N may be 0.
        weight: one kernel a channel, `[C,1,Kh,Kw]`, both sides odd, dtype and device of `x`. A kernel may be
            larger than the image.
        bias: `[C]`, or None.
        relu: apply `max(y, 0)` before the result is stored.
        algorithm: "direct" sums products, so that an error stays in the outputs that see it; "fft" goes
            through Fourier transforms, whose error is relative to the norm of the channel; "auto" takes the
            faster.

    Returns:
        `[N,C,H,W]`, dtype of `x`; channels_last if `x` is channels_last and not contiguous, else
        contiguous. Sums are in float32, or float64 for float64.

    Raises:
        ValueError: a shape, dtype, device or the algorithm's name does not fit; the text has the values.
        RuntimeError: no backend takes the call, or the forced one does not.

    Source: Ding et al. 2022, arXiv:2203.06717, section 3 (guideline 1).
    """
    if _nothing_watches(x, weight, bias):
        recorded = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        run = _Recorded.apply if recorded else _computed
        return run(x, weight, bias, relu, _accepted(x, weight, bias, algorithm))
    kind = x.device.type
    # the meta device has no autocast to ask about; torch 2.11 cannot compile the question whether a device has one
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        given = weight
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
        # what is prepared from the copy stays with the weight
        if weight is not given and not torch.compiler.is_compiling():
            prepared.share(weight, given)
    if torch.jit.is_tracing():  # sizes are tensors there, which the checks would record
        return _plain(x, weight, bias, relu)
    _check(x, weight, bias, algorithm)
    if _must_be_plain():
        return _plain(x, weight, bias, relu)
    return torch.ops.replknet.depthwise_conv2d(x, weight, bias, relu, algorithm)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # as torch's own autocast, which leaves float64 alone
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [N,C,H,W], got {x.dim()} dimensions {list(x.shape)}; x[None] adds a batch")
    c = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] != c or weight.shape[1] != 1:
        raise ValueError(
            f"weight must be [{c},1,Kh,Kw], one kernel for each channel of x {list(x.shape)}, got {list(weight.shape)}"
        )
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"kernel sides must be odd, got {kh}x{kw}; torch.nn.Conv2d takes even ones")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have at least one pixel, got {list(x.shape)}")
    if bias is not None and list(bias.shape) != [c]:
        raise ValueError(f"bias must be [{c}], one value a channel, got {list(bias.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}; {name}.to(x.dtype) converts")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")


def _must_be_plain() -> bool:
    """Whether the call must be torch's own convolution.

    Exported files have to run without this package. Forward-mode AD would silently give a custom op a zero
    tangent, and functorch has no batching rule for it.
    """
    return (
        torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


_TENSORS = (Tensor, torch.nn.Parameter)


def _nothing_watches(*tensors: Tensor | None) -> bool:
    """Whether the op may be computed without torch's dispatcher, which costs more than a small convolution.

    Compilers and tracers, autocast, transforms, modes (counters, fake tensors) and subclasses of tensors have to
    see the op.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or _must_be_plain()
    ):
        return False
    for t in tensors:  # noqa: SIM110 - a generator takes a microsecond
        if t is not None and (type(t) not in _TENSORS or not (t.is_cpu or t.is_cuda)):
            return False
    return True


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    y = conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])
    return y.relu() if relu else y


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of the result: the one rule for the real and the fake kernels."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def call_of(x: Tensor, weight: Tensor, algorithm: Algorithm = "auto") -> Call:
    """The call that `depthwise_conv2d` would make with these arguments, which may be on the meta device.

    Raises:
        ValueError: the operator does not accept them.
    """
    _check(x, weight, None, algorithm)
    return _call(x, weight, algorithm)


def _call(x: Tensor, weight: Tensor, algorithm: str) -> Call:
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    return Call(
        shape=(n, c, h, w),
        kernel=(kh, kw),
        dtype=x.dtype,
        device=x.device.type,
        channels_last=_layout(x) is torch.channels_last,
        algorithm=algorithm,
    )


# what was checked, and the call that came of it; a call costs less than its checks for the smallest maps
_ACCEPTED: dict[tuple[object, ...], Call] = {}
_MOST_ACCEPTED = 4096


def _accepted(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Call:
    """Checks the arguments, unless others like them were checked before; the call they make."""
    # a tensor here is on the CPU, which is device -1, or on a CUDA device
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.get_device())
    of_weight = weight.shape, weight.dtype, weight.get_device()
    facts = (x.shape, x.dtype, x.get_device(), _layout(x), of_weight, of_bias, algorithm)
    call = _ACCEPTED.get(facts)
    if call is None:
        _check(x, weight, bias, algorithm)
        if len(_ACCEPTED) >= _MOST_ACCEPTED:
            _ACCEPTED.clear()
        call = _ACCEPTED[facts] = _call(x, weight, algorithm)
    return call


def _refuse_forward_mode() -> None:
    """A custom op called by name would drop the tangents of forward-mode AD without a word."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "torch.ops.replknet has no forward-mode derivative; call replknet.ops.depthwise_conv2d inside the "
            "dual level, which takes torch's own convolution there"
        )


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The arguments have their final dtype; autocast must not reach into a backend's own calls to torch."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@torch.library.custom_op(
    "replknet::depthwise_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool relu, str algorithm) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    _refuse_forward_mode()
    with _without_autocast(x):
        return _computed(x, weight, bias, relu, _call(x, weight, algorithm))


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, call: Call) -> Tensor:
    layout = _layout_of(call)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    y = choose(call).forward(x.contiguous(memory_format=layout), _dense(weight), bias, relu, call.algorithm)
    return _settled(y, layout)


def _dense(weight: Tensor) -> Tensor:
    found = weight.contiguous()
    if found is not weight:
        prepared.share(found, weight)
    return found


def _layout_of(call: Call) -> torch.memory_format:
    return torch.channels_last if call.channels_last else torch.contiguous_format


def _settled(result: Tensor, layout: torch.memory_format) -> Tensor:
    """`result` with exactly the strides that an empty tensor of that layout has."""
    _, c, h, w = result.shape
    last = layout is torch.channels_last
    strides = (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    if result.stride() == strides:
        return result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device, memory_format=layout).copy_(result)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _empty_gradients(x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dx, dw, db; an op cannot return None, so an unwanted one has no elements."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    layouts = (_layout(x), torch.contiguous_format, torch.contiguous_format)
    dx, dw, db = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout) if want else x.new_empty(0)
        for shape, layout, want in zip(shapes, layouts, wanted, strict=True)
    )
    return dx, dw, db


@torch.library.custom_op(
    "replknet::depthwise_conv2d_backward",
    mutates_args=(),
    schema=("(Tensor dy, Tensor x, Tensor weight, bool[] wanted, str algorithm) -> (Tensor, Tensor, Tensor)"),
)
def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    if x.numel() == 0:
        dx, dw, db = _empty_gradients(x, weight, wanted)
        return dx, dw.zero_(), db.zero_()
    with _without_autocast(x):
        dx, dw, db = (
            x.new_empty(0) if found is None else found
            for found in _computed_gradients(dy, x, weight, wanted, _call(x, weight, algorithm))
        )
    return dx, dw, db


def _computed_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], call: Call
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    layout = _layout_of(call)
    dx, dw, db = choose(call).backward(
        dy.contiguous(memory_format=layout),
        x.contiguous(memory_format=layout),
        _dense(weight),
        wanted,
        call.algorithm,
    )
    return (
        None if dx is None else _settled(dx, layout),
        None if dw is None else _settled(dw, torch.contiguous_format),
        None if db is None else db.contiguous(),
    )


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, weight, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu, algorithm = inputs
    ctx.save_for_backward(x, weight, output if relu else None)
    ctx.algorithm = algorithm


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight, y = ctx.saved_tensors
    if y is not None:
        dy = dy * (y > 0)
    wanted = list(ctx.needs_input_grad[:3])
    # gradients that are recorded in turn need the op, which knows its own
    if x.numel() > 0 and not torch.is_grad_enabled() and _nothing_watches(dy, x, weight):
        found = _computed_gradients(dy, x, weight, wanted, _accepted(x, weight, None, ctx.algorithm))
        return *found, None, None
    results = torch.ops.replknet.depthwise_conv2d_backward(dy, x, weight, wanted, ctx.algorithm)
    dx, dw, db = (result if want else None for result, want in zip(results, wanted, strict=True))
    return dx, dw, db, None, None


_forward.register_autograd(_backward, setup_context=_save)


class _Recorded(torch.autograd.Function):
    """The op with its gradient, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, call: Call) -> Tensor:
        y = _computed(x, weight, bias, relu, call)
        _save(ctx, (x, weight, bias, relu, call.algorithm), y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        return _backward(ctx, dy)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, x, weight, wanted, algorithm = inputs
    ctx.save_for_backward(dy, x, weight)
    ctx.wanted, ctx.algorithm = wanted, algorithm


def _double_backward(
    ctx: Any, gx: Tensor, gw: Tensor, gb: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """The operator A(x, w) is bilinear, so the derivatives of its adjoints are A and the adjoints again.

    With dx = A'(dy, w), dw = B(dy, x), db = sum(dy) and the cotangents gx, gw, gb:
    for dy: A(gx, w) + A(x, gw) + gb; for x: A'(dy, gw); for w: B(dy, gx).
    """
    dy, x, weight = ctx.saved_tensors
    forward, gradients = torch.ops.replknet.depthwise_conv2d, torch.ops.replknet.depthwise_conv2d_backward
    want_dy, want_x, want_w = ctx.needs_input_grad[:3]
    has_dx, has_dw, has_db = ctx.wanted
    for_dy = for_x = for_w = None
    if want_dy:
        for_dy = torch.zeros_like(dy)
        if has_dx:
            for_dy = for_dy + forward(gx, weight, None, False, ctx.algorithm)
        if has_dw:
            for_dy = for_dy + forward(x, gw, None, False, ctx.algorithm)
        if has_db:
            for_dy = for_dy + gb[:, None, None]
    if want_x and has_dw:
        for_x = gradients(dy, x, gw, [True, False, False], ctx.algorithm)[0]
    if want_w and has_dx:
        for_w = gradients(dy, gx, weight, [False, True, False], ctx.algorithm)[1]
    return for_dy, for_x, for_w, None, None


_gradients.register_autograd(_double_backward, setup_context=_save_gradients)


@register_flop_formula(torch.ops.replknet.depthwise_conv2d)
def _flops(x_shape: list[int], w_shape: list[int], *_: object, **__: object) -> int:
    """Multiplications and additions counted apart, padding included, as torch counts a convolution."""
    n, c, h, w = x_shape
    return 2 * n * c * h * w * w_shape[2] * w_shape[3]


@register_flop_formula(torch.ops.replknet.depthwise_conv2d_backward)
def _flops_backward(
    dy_shape: list[int], x_shape: list[int], w_shape: list[int], wanted: list[bool], *_: object, **__: object
) -> int:
    return _flops(x_shape, w_shape) * (wanted[0] + wanted[1])
