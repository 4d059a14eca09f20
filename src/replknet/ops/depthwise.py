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
    In exports and traces, under forward-mode AD and in `torch.func` transforms the call is torch's own convolution.

    Args:
        x: images `[N,C,H,W]`, float64, float32, float16 or bfloat16; N may be 0.
        weight: one kernel a channel, `[C,1,Kh,Kw]`, both sides odd, dtype and device of `x`. A kernel may be
            larger than the image.
        bias: `[C]`, dtype and device of `x`; or None.
        relu: apply `max(y, 0)` before the result is stored.
        algorithm: "direct", "fft" or "auto". "direct" sums products. An error stays in the outputs that see it, and no
            sign, NaN or infinity appears that torch's own convolution does not give. "fft" uses Fourier transforms.
            Its error is relative to the norm of the channel; GPUs have no "fft". "auto" takes the faster one. On a GPU
            "auto" may spread an infinity or NaN to other outputs in its image and channel.

    Returns:
        `[N,C,H,W]`, dtype of `x`. The memory format follows the order of the strides of `x`, as in torch's own
        convolution. Sums are in float32, or in float64 for float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or no algorithm has that name; the text has the values.
        RuntimeError: no backend takes the call, or the forced backend does not.

    Source: Ding et al. 2022, arXiv:2203.06717, section 3 (guideline 1).
    """
    kind = "cpu" if x.is_cpu else x.device.type  # is_cpu takes a fifth of the time
    # the meta device has no autocast; torch 2.11 cannot compile a call that asks whether a device has autocast
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = _cast(x, dtype), _cast_weight(weight, dtype), None if bias is None else _cast(bias, dtype)
    if must_be_plain(x, weight, bias):
        # a trace would record the sizes that are checked as tensors
        if not torch.jit.is_tracing():
            check(x, weight, bias, algorithm)
        return plain(x, weight, bias, relu)
    if torch.compiler.is_compiling():
        return differentiable(x, weight, bias, relu, algorithm)
    if type(x) not in _ORDINARY or type(weight) not in _ORDINARY:
        know_sharded()
    return recorded(x, weight, bias, relu, algorithm)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # like torch's own autocast, leave float64 alone
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = _cast(weight, dtype)
    # forms prepared from the copy are kept with the weight
    if cast is not weight and not torch.compiler.is_compiling():
        prepared.share(cast, weight)
    return cast
