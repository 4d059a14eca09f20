"""The public operator."""

import torch
from torch import Tensor

from replknet.kernels import Algorithm, prepared
from replknet.ops.call import check
from replknet.ops.derivatives import plain, recorded
from replknet.ops.schemas import differentiable
from replknet.ops.sharding import know_sharded
from replknet.ops.transforms import must_be_plain

_ORDINARY = (Tensor, torch.nn.Parameter)


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
        algorithm: "direct" sums products, so that an error stays in the outputs that see it, and no sign, NaN or
            infinity appears that torch's own convolution does not give; "fft" goes through Fourier transforms, whose
            error is relative to the norm of the channel, and there are none on GPUs; "auto" takes the faster. On a GPU
            "auto" may let an infinity or a NaN reach outputs beside those that see it, in its image and channel.

    Returns:
        `[N,C,H,W]`, dtype of `x`, in the memory format that the order of the strides of `x` has, as torch's own
        convolution gives it. Sums are in float32, or float64 for float64.

    Raises:
        ValueError: a shape, dtype, device or the algorithm's name does not fit; the text has the values.
        RuntimeError: no backend takes the call, or the forced one does not.

    Source: Ding et al. 2022, arXiv:2203.06717, section 3 (guideline 1).
    """
    kind = "cpu" if x.is_cpu else x.device.type  # the first takes a fifth of the time
    # the meta device has no autocast to ask about; torch 2.11 cannot compile the question whether a device has one
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = _cast(x, dtype), _cast_weight(weight, dtype), None if bias is None else _cast(bias, dtype)
    if must_be_plain(x, weight, bias):
        # a trace would record the checks' sizes as tensors
        if not torch.jit.is_tracing():
            check(x, weight, bias, algorithm)
        return plain(x, weight, bias, relu)
    if torch.compiler.is_compiling():
        return differentiable(x, weight, bias, relu, algorithm)
    if type(x) not in _ORDINARY or type(weight) not in _ORDINARY:
        know_sharded()
    return recorded(x, weight, bias, relu, algorithm)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # as torch's own autocast, which leaves float64 alone
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = _cast(weight, dtype)
    # what is prepared from the copy stays with the weight
    if cast is not weight and not torch.compiler.is_compiling():
        prepared.share(cast, weight)
    return cast
