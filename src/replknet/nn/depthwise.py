"""The depthwise convolution as a module."""

from typing import cast, get_args

import torch
from torch import Tensor, nn

from replknet.kernels import Algorithm
from replknet.ops import depthwise_conv2d

# each becomes one node of a torch.fx graph: fx does not trace into it
torch.fx.wrap("depthwise")
torch.fx.wrap("strided_depthwise")

# from this side on a full convolution plus subsampling wins over torch's strided one: measured on a CPU for sides of 3,
# 5, 9 and 13
_LARGE = 13


def checked(algorithm: Algorithm) -> Algorithm:
    """The name of an algorithm, checked.

    Raises:
        ValueError: no algorithm has that name.
    """
    names = get_args(Algorithm)
    if algorithm not in names:
        raise ValueError(f"algorithm must be one of {', '.join(names)}, got {algorithm!r}")
    return algorithm


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)` on the operator.

    Parameters, state-dict keys and initialisation equal those of `nn.Conv2d`, so each loads the other's state dict.

    Args:
        channels: channels of input and output.
        kernel_size: side of the kernel in pixels, or (height, width); odd.
        bias: whether to add a bias `[C]`.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, float16 or bfloat16.
        algorithm: "direct", "fft" or "auto", as in `replknet.ops.depthwise_conv2d`. It can be changed later, and is not
            in the state dict.

    Input and output: `[N,C,H,W]`, the dtype of the parameters, contiguous or channels_last; sums and errors as
    in `replknet.ops.depthwise_conv2d`.

    Raises:
        ValueError: a kernel side is even, or no algorithm has that name. For even, strided or dilated kernels use
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
        # TorchScript cannot call the operator, and a trace would record its checks of sizes: both get torch's own
        # convolution
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise(input, self.weight, self.bias, self.algorithm)


class StridedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of any stride.

    Small kernels run on torch's own convolution. For large kernels the operator computes all pixels, and every
    `stride`-th pixel of each row and column is kept.

    On a CPU torch computes the gradients of strided depthwise convolutions in bfloat16 and float16 without vectors.
    While gradients are recorded on a CPU, small kernels of these dtypes run in float32, and the result is rounded once.

    Args:
        channels: channels of input and output.
        kernel_size: side of the kernel in pixels, odd.
        stride: step of the convolution in pixels.
        bias: whether to add a bias `[C]`.
        algorithm: algorithm of the operator, for large kernels.

    Input `[N,C,H,W]` and output `[N,C,H',W']` have the shapes and dtypes of `nn.Conv2d` with padding kernel_size // 2.
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


# TorchScript has no Literal, so the algorithm is a string here and is cast
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Tensor:
    """What `DepthwiseConv2d` computes; torch's own convolution if TorchScript compiles a torch.fx graph."""
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return nn.functional.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
    return depthwise_conv2d(x, weight, bias, False, cast(Algorithm, algorithm))


def strided_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, algorithm: str) -> Tensor:
    """What `StridedDepthwiseConv2d` computes; under TorchScript as in `depthwise`."""
    if torch.jit.is_scripting():
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
        return nn.functional.conv2d(x, weight, bias, [stride, stride], padding, groups=x.shape[1])
    if min(weight.shape[2:]) >= _LARGE:
        return _every(depthwise_conv2d(x, weight, bias, False, cast(Algorithm, algorithm)), stride)
    return _strided(x, weight, bias, stride)


def _every(y: Tensor, stride: int) -> Tensor:
    """Every `stride`-th pixel of each row and column, in the memory format of `y`."""
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
    """The module for a depthwise convolution; with stride 1 it keeps the size.

    Args:
        channels: channels of input and output.
        kernel_size: side of the kernel in pixels, odd.
        stride: step of the convolution in pixels.
        dilation: pixels from one tap of the kernel to the next; above 1 the module is torch's own convolution.
        bias: whether to add a bias `[C]`.
    """
    if dilation > 1:
        padding = dilation * (kernel_size // 2)
        return nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=bias)
    if stride > 1:
        return StridedDepthwiseConv2d(channels, kernel_size, stride, bias)
    return DepthwiseConv2d(channels, kernel_size, bias)
