"""Which arguments the operator accepts, the `Call` that they make, and the memory format of the result."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replknet import kernels
from replknet.kernels import ALGORITHMS, Algorithm, Backend, Call, native, native_core

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> None:
    """Raise a ValueError with what was expected and what came, if the arguments do not fit each other."""
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


def check_gradient(dy: Tensor, x: Tensor) -> None:
    """As `check`, for the gradient of the result."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"dy must have the shape, dtype and device of x, {list(x.shape)} {x.dtype} on {x.device}, "
            f"got {list(dy.shape)} {dy.dtype} on {dy.device}"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of the result and of the gradient for x: one rule for real and for fake tensors.

    As in torch's own convolution it follows the order of the strides of `x`. So a slice of the channels of a
    channels_last tensor is channels_last, too. A tensor that fits both formats, such as one pixel of one channel, is
    contiguous.
    """
    return torch.channels_last if _is_channels_last(x.shape, x.stride()) else torch.contiguous_format


def _is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    n, c, h, w = range(4)
    # the stride of an axis must reach past the whole axis before it
    past = 0
    for axis in (c, w, h):
        if shape[axis] == 0 or strides[axis] < past:
            return False
        past = strides[axis] * shape[axis]
    # channels expanded from one number have no order, and one pixel of one channel fits both orders
    ordered = strides[c] > 0 and past != strides[c]
    return shape[n] > 0 and ordered and strides[n] >= past


def call_of(x: Tensor, weight: Tensor, algorithm: Algorithm = "auto") -> Call:
    """The call that `depthwise_conv2d` would make with these arguments; they may be on the meta device.

    Raises:
        ValueError: the operator does not accept the arguments.
    """
    check(x, weight, None, algorithm)
    return _call(x, weight, algorithm)


def _call(x: Tensor, weight: Tensor, algorithm: str) -> Call:
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    return Call(
        shape=(n, c, h, w),
        kernel=(kh, kw),
        dtype=x.dtype,
        device=x.device.type,
        index=x.device.index or 0,
        channels_last=memory_format(x) is torch.channels_last,
        algorithm=algorithm,
    )


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is known about a call whose arguments were checked."""

    layout: torch.memory_format  # of the result
    strides: tuple[int, ...]  # of an empty tensor of that layout
    backend: Backend | None  # None: there is nothing to compute


# keyed by everything that the checks and the choice of a backend look at; both cost more than a call on a small map
_ACCEPTED: dict[tuple[object, ...], Accepted] = {}
_MOST_ACCEPTED = 4096


def accepted(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Accepted:
    """Check the arguments, unless others like them were checked before.

    Raises:
        ValueError: as in `check`.
        RuntimeError: no backend takes the call.
    """
    facts = (
        _facts(x, weight, algorithm),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )
    found = _ACCEPTED.get(facts)
    if found is None:
        check(x, weight, bias, algorithm)
        found = _remembered(facts, x, weight, algorithm)
    return found


def accepted_gradients(dy: Tensor, x: Tensor, weight: Tensor, algorithm: str) -> Accepted:
    """As `accepted`, for the arguments of the gradients."""
    facts = _facts(x, weight, algorithm), (dy.shape, dy.dtype, dy.device)
    found = _ACCEPTED.get(facts)
    if found is None:
        check(x, weight, None, algorithm)
        check_gradient(dy, x)
        found = _remembered(facts, x, weight, algorithm)
    return found


def _facts(x: Tensor, weight: Tensor, algorithm: str) -> tuple[object, ...]:
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        weight.shape,
        weight.dtype,
        weight.device,
        algorithm,
        kernels.forced(),
        kernels.BACKENDS,
    )


def _remembered(facts: tuple[object, ...], x: Tensor, weight: Tensor, algorithm: str) -> Accepted:
    layout = memory_format(x)
    strides = torch.empty(x.shape, device="meta", memory_format=layout).stride()
    backend = None
    if x.numel() > 0:
        call = _call(x, weight, algorithm)
        backend = kernels.choose(call)
        if kernels.forced() is None and native.misses_core(call):
            native_core.warn_missing()
    if len(_ACCEPTED) >= _MOST_ACCEPTED:
        _ACCEPTED.clear()
    _ACCEPTED[facts] = found = Accepted(layout, strides, backend)
    return found
