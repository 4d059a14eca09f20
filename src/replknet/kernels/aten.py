"""Torch's own convolution, called in its fastest forms. It takes every call, except that it has no "fft".

On a CPU the speed of torch's depthwise kernels differs by an order of magnitude between layouts and between
directions. So a large kernel always runs as a channels_last *forward* convolution:

- The gradient for x is the operator with the kernel rotated by 180 degrees.
- The gradient for the weight is the operator with x as the image and dy as the kernel. Each pair of image and channel
  is one "channel". Only Kh x Kw outputs are computed.

Times: docs/decisions/0002-aten-gradients.md.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from replknet.kernels.backend import Backend, Call

# below this many taps torch's own backward wins on a CPU
_LARGE_TAPS = 25
# image-channel pairs in one call of the weight gradient; more do not fit the cache
_PAIRS = 1024


def _in_float(x: Tensor) -> bool:
    """Whether sums need float32 copies: torch's own low-precision sums on a CPU are too coarse.

    Torch's bfloat16 weight gradient exceeds the bound of tests/oracle.py by up to 124 times.
    """
    return x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)


def margins(weight: Tensor, h: int, w: int) -> tuple[int, int]:
    """Rows and columns at each edge of the kernel that meet only padding on an h x w map."""
    return max(0, weight.shape[2] // 2 - (h - 1)), max(0, weight.shape[3] // 2 - (w - 1))


def inner(weight: Tensor, mh: int, mw: int) -> Tensor:
    """The kernel without `mh` rows and `mw` columns at each edge."""
    if mh == mw == 0:
        return weight
    return weight[:, :, mh : weight.shape[2] - mh, mw : weight.shape[3] - mw]


def _fast_layout(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type == "cpu" and weight.shape[2] * weight.shape[3] >= _LARGE_TAPS:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kh, kw = weight.shape[2:]
    return conv2d(_fast_layout(x, weight), weight, bias, padding=(kh // 2, kw // 2), groups=x.shape[1])


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off: the tensors here already have their final dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "direct") -> Tensor:
    dtype = x.dtype
    if _in_float(x):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    with _without_autocast(x):
        y = _convolved(x, inner(weight, *margins(weight, *x.shape[2:])), bias)
    return (y.relu_() if relu else y).to(dtype)


def _weight_gradient(dy: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """dw `[C,1,Kh,Kw]`, by the channels_last forward convolution of x with dy."""
    n, c, h, w = x.shape
    images = max(1, _PAIRS // c)
    dw = x.new_zeros(c, 1, kh, kw)
    for first in range(0, n, images):
        part = x[first : first + images]
        pairs = part.shape[0] * c
        # [H,W,N*C] in memory, seen as one image of N*C channels
        image = part.permute(2, 3, 0, 1).reshape(1, h, w, pairs).permute(0, 3, 1, 2)
        kernel = dy[first : first + images].reshape(pairs, 1, h, w)
        products = conv2d(image, kernel, padding=(kh // 2, kw // 2), groups=pairs)
        dw += products.reshape(-1, c, 1, kh, kw).sum(0)
    return dw


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "direct"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = x.dtype
    if _in_float(x):
        dy, x, weight = dy.float(), x.float(), weight.float()
    with _without_autocast(x):
        dx, dw = _data_and_weight_gradients(dy, x, weight, wanted)
        db = dy.sum((0, 2, 3)) if wanted[2] else None
    return _to(dx, dtype), _to(dw, dtype), _to(db, dtype)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dw `[C,1,Kh,Kw]` alone."""
    _, dw, _ = backward(dy, x, weight, [False, True, False])
    assert dw is not None
    return dw


def _data_and_weight_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    c = x.shape[1]
    mh, mw = margins(weight, *x.shape[2:])
    used = inner(weight, mh, mw)
    ih, iw = used.shape[2:]
    if x.device.type == "cpu" and ih * iw >= _LARGE_TAPS:
        dx = _convolved(dy, used.flip(2, 3)) if wanted[0] else None
        dw = _weight_gradient(dy, x, ih, iw) if wanted[1] else None
    else:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, used, None, [1, 1], [ih // 2, iw // 2], [1, 1], False, [0, 0], c, [*wanted[:2], False]
        )
    return dx, None if dw is None else pad(dw, (mw, mw, mh, mh))


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _refusal(call: Call) -> str | None:
    return "has only the direct algorithm" if call.algorithm == "fft" else None


BACKEND = Backend(name="aten", refusal=_refusal, forward=forward, backward=backward)
