"""The layers of the inference form: images as rows of channels, nothing done twice.

A channels_last map `[N,C,H,W]` is a matrix `[N*H*W,C]` without a copy, so a 1x1 convolution is a matrix product. Where
oneDNN offers it, bias, activation or shortcut is added while the product is still in registers.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from replknet.kernels.onednn import computes_bfloat16, packs_matrices
from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

Activation = Literal["none", "relu", "gelu"]
# larger maps are worked on in parts, so that the next layer finds its input in the cache
CACHE_BYTES = 16 << 20


def packs(like: Tensor) -> bool:
    """Whether matrices of this dtype and device are kept in oneDNN's own form.

    Args:
        like: any tensor of that dtype on that device.
    """
    if like.device.type != "cpu" or not packs_matrices():
        return False
    return like.dtype == torch.float32 or (like.dtype == torch.bfloat16 and computes_bfloat16() is True)


class Product(nn.Module):
    """Rows times a matrix, plus a bias, and then an activation or the sum with other rows.

    Args:
        weight: `[O,I]`, as nn.Linear has it.
        bias: `[O]`, or None.
        rows: usual number of rows.

    Input: rows `[R,I]`; for a sum also other rows `[R,O]`, and then no activation.
    Output: `[R,O]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.packed = packs(weight)
        self.outputs, self.inputs = weight.shape
        self._bias = None if bias is None else bias.detach()
        weight = weight.detach().contiguous()
        # the form is also right for other numbers of rows
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight

    def forward(self, rows: Tensor, activation: Activation = "none", add: Tensor | None = None) -> Tensor:
        if self.packed:
            op = torch.ops.mkldnn._linear_pointwise
            if add is not None:
                return op.binary(rows, add, self._weight, self._bias, "add")
            return op(rows, self._weight, self._bias, activation, [], "none")
        product = F.linear(rows, self._weight, self._bias)
        if add is not None:
            return product.add_(add)
        return activated(product, activation)


def activated(x: Tensor, activation: Activation) -> Tensor:
    """The activation, in place if torch offers it."""
    if activation == "relu":
        return x.relu_()
    return F.gelu(x) if activation == "gelu" else x


def as_rows(x: Tensor) -> Tensor:
    """`[N,C,H,W]` to `[N*H*W,C]`, without a copy if x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_image(rows: Tensor, like: Tensor) -> Tensor:
    """`[N*H*W,C]` to `[N,C,H,W]` in channels_last, with the batch and sides of `like`."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


class Pointwise(nn.Module):
    """A 1x1 convolution with its activation.

    Args:
        conv: of stride 1, without groups.
        activation: after it.
        rows: pixels of a usual batch.

    Input `[N,I,H,W]` and output `[N,O,H,W]`, channels_last.
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation, rows: int) -> None:
        super().__init__()
        self.product, self.activation = product_of(conv, rows), activation

    def forward(self, x: Tensor) -> Tensor:
        return as_image(self.product(as_rows(x), self.activation), x)


def product_of(conv: nn.Conv2d, rows: int) -> Product:
    """The matrix product that replaces a 1x1 convolution."""
    return Product(conv.weight[:, :, 0, 0], conv.bias, rows)


class Depthwise(nn.Module):
    """A depthwise convolution and its ReLU, in one step of the operator."""

    def __init__(self, conv: DepthwiseConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.conv.weight, self.conv.bias, relu=True, algorithm=self.conv.algorithm)


class Convolution(nn.Module):
    """Any other convolution with its activation, in place where torch offers it."""

    def __init__(self, conv: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.conv(x), self.activation)


class LargeKernelBlock(nn.Module):
    """RepLKBlock: product and ReLU, large kernel and ReLU, product and the sum with the input.

    Args:
        first: to the channels of the large kernel.
        large: the merged convolution and its ReLU.
        second: back to the channels of the input.
    """

    def __init__(self, first: Product, large: nn.Module, second: Product) -> None:
        super().__init__()
        self.first, self.large, self.second = first, large, second

    def forward(self, x: Tensor) -> Tensor:
        rows = as_rows(x)
        y = self.large(as_image(self.first(rows, "relu"), x))
        return as_image(self.second(as_rows(y), add=rows), x)


class FeedForward(nn.Module):
    """ConvFFN, on as many rows at a time as have their hidden channels in the cache at once.

    Args:
        first: to the hidden channels.
        second: back to the channels of the input.
        itemsize: bytes of a number; None for all rows at once.
    """

    def __init__(self, first: Product, second: Product, itemsize: int | None) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.rows = None if itemsize is None else max(1, CACHE_BYTES // (first.outputs * itemsize))

    def forward(self, x: Tensor) -> Tensor:
        rows = as_rows(x)
        if self.rows is None or len(rows) <= self.rows:
            return as_image(self._some(rows), x)
        y = torch.empty_like(rows)
        for part, to in zip(rows.split(self.rows), y.split(self.rows), strict=True):
            to.copy_(self._some(part))
        return as_image(y, x)

    def _some(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows, "gelu"), add=rows)


class Grouped(nn.Module):
    """Layers that run on a few images, or rows of an image, at a time, so that their maps fit into the cache.

    Args:
        layers: run one after the other.
        bytes_a_pixel: of the largest map inside, for each pixel of the input.
        stride: pixels of the input for one of the output.
        margin: rows above and below a part that its outputs depend on, or more; a multiple of the stride. None where
            outputs depend on all rows.
    """

    def __init__(
        self, layers: Callable[[Tensor], Tensor], bytes_a_pixel: float, stride: int = 1, margin: int | None = None
    ) -> None:
        super().__init__()
        self.layers, self.bytes_a_pixel, self.stride, self.margin = layers, bytes_a_pixel, stride, margin

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        pixels = CACHE_BYTES / self.bytes_a_pixel
        images, rows = max(1, int(pixels / (h * w))), max(1, int(pixels / w) // self.stride) * self.stride
        tops = range(0, h, rows) if self.margin is not None else range(1)
        if n <= images and len(tops) == 1:
            return self.layers(x)
        y: Tensor | None = None
        for i in range(0, n, images):
            for top in tops:
                part = self._strip(x[i : i + images], top, rows) if len(tops) > 1 else self.layers(x[i : i + images])
                if y is None:
                    height = -(-h // self.stride) if len(tops) > 1 else part.shape[2]
                    y = _empty((n, part.shape[1], height, part.shape[3]), part)
                y[i : i + images, :, top // self.stride :][:, :, : part.shape[2]] = part
        assert y is not None
        return y

    def _strip(self, x: Tensor, top: int, rows: int) -> Tensor:
        """The outputs of some rows."""
        assert self.margin is not None
        first = max(0, top - self.margin)
        found = self.layers(x[:, :, first : top + rows + self.margin])
        skipped, inside = (top - first) // self.stride, min(rows, x.shape[2] - top)
        return found[:, :, skipped : skipped + -(-inside // self.stride)]


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
