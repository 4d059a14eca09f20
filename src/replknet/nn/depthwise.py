"""The depthwise convolution as a module."""

from typing import cast, get_args

import torch
from torch import Tensor, nn

from replknet.kernels import Algorithm
from replknet.ops import depthwise_conv2d

# in a graph of torch.fx each is one node, not what it asks of its input
torch.fx.wrap("depthwise")
torch.fx.wrap("strided_depthwise")

# side from which the operator at all pixels takes less time than torch at the few: measured on a CPU, of 3, 5, 9, 13
_LARGE = 13


def checked(algorithm: Algorithm) -> Algorithm:
    """The name of an algorithm, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    names = get_args(Algorithm)
    if algorithm not in names:
        raise ValueError(f"algorithm must be one of {', '.join(names)}, got {algorithm!r}")
    return algorithm


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)` on the operator.

    Parameters, state-dict keys and initialisation are those of `nn.Conv2d`, so the two load each other.

    Args:
        channels: channels of input and output.
        kernel_size: side of the kernel in pixels, or (height, width); odd.
        bias: whether to add a bias `[C]`.
        device: of the parameters.
        dtype: of the parameters: float64, float32, float16 or bfloat16.
        algorithm: "direct", "fft" or "auto", as in `replknet.ops.depthwise_conv2d`; it can be changed later, and is no
            part of the state dict.

    Input and output: `[N,C,H,W]`, the dtype of the parameters, contiguous or channels_last; sums and errors as
    in `replknet.ops.depthwise_conv2d`.

    Raises:
        ValueError: a kernel side is even, or the algorithm's name is none. Even, strided or dilated kernels are
            `nn.Conv2d`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        algorithm: Algorithm = "auto",
    ) -> None:
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel sides must be odd, got {kh}x{kw}; torch.nn.Conv2d takes even ones")
        super().__init__(
            channels,
            channels,
            (kh, kw),
            padding=(kh // 2, kw // 2),
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.algorithm = checked(algorithm)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.algorithm == "auto" else f", algorithm={self.algorithm}")

    def forward(self, input: Tensor) -> Tensor:
        # TorchScript cannot call the operator, and a trace would record its questions about sizes:
        # both get torch's own convolution
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise(input, self.weight, self.bias, self.algorithm)


class StridedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of any stride: torch's own for small kernels, every so many pixels of the operator's for
    large ones.

    For bfloat16 and float16 torch takes the gradients of strided depthwise convolutions on a CPU without vectors; here
    a training on a CPU has these convolutions in float32, and rounds the result once.

    Args:
        channels: channels of input and output.
        kernel_size: side of the kernel in pixels, odd.
        stride: in pixels.
        bias: whether to add a bias `[C]`.
        algorithm: of the operator, where that is used.

    Input `[N,C,H,W]` and output `[N,C,H',W']` are those of `nn.Conv2d` with padding kernel_size // 2, in the dtype that
    it has.
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int, bias: bool = False, algorithm: Algorithm = "auto"
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, kernel_size // 2, groups=channels, bias=bias)
        self.algorithm = checked(algorithm)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return self._conv_forward(input, self.weight, self.bias)
        return strided_depthwise(input, self.weight, self.bias, self.stride[0], self.algorithm)


# TorchScript has no Literal, hence the strings that are cast
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Tensor:
    """What `DepthwiseConv2d` computes; in a graph of torch.fx that TorchScript compiles, torch's own convolution."""
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return nn.functional.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
    return depthwise_conv2d(x, weight, bias, False, cast(Algorithm, algorithm))


def strided_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, algorithm: str) -> Tensor:
    """What `StridedDepthwiseConv2d` computes; for TorchScript as in `depthwise`."""
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return nn.functional.conv2d(x, weight, bias, [stride, stride], padding, groups=x.shape[1])
    if min(weight.shape[2:]) >= _LARGE:
        return _every(depthwise_conv2d(x, weight, bias, False, cast(Algorithm, algorithm)), stride)
    return _strided(x, weight, bias, stride)


def _every(y: Tensor, stride: int) -> Tensor:
    """Every so many pixels of each row and column, in the memory format of the whole."""
    last = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    taken = y[:, :, ::stride, ::stride]
    return taken.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _strided(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    half = dtype in (torch.bfloat16, torch.float16)
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not half:
        return nn.functional.conv2d(x, weight, bias, stride, padding, groups=len(weight))
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.float()
        y = nn.functional.conv2d(x.float(), weight.float(), wide, stride, padding, groups=len(weight))
    return y.to(dtype)


def depthwise_conv(
    channels: int, kernel_size: int, stride: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Conv2d:
    """The module for a depthwise convolution that keeps the size, but for the stride.

    Args:
        channels: of input and output.
        kernel_size: side of the kernel in pixels, odd.
        stride: in pixels.
        dilation: pixels from one value of the kernel to the next; with more than 1 it is torch's own convolution.
        bias: whether to add a bias `[C]`.
    """
    if dilation > 1:
        padding = dilation * (kernel_size // 2)
        return nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=bias)
    if stride > 1:
        return StridedDepthwiseConv2d(channels, kernel_size, stride, bias)
    return DepthwiseConv2d(channels, kernel_size, bias)
