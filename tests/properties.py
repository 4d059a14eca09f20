"""Random calls of the operator for properties, each a function of its seed, and how far results may be apart."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import rounding
from replknet.ops import depthwise_conv2d

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@dataclass(frozen=True)
class Sample:
    """Sizes of a call, what it is in, and what its values are drawn from."""

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    dtype: torch.dtype
    layout: torch.memory_format
    algorithm: str
    seed: int

    def images(self, count: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randn(self.shape, generator=generator).to(self.dtype) for _ in range(count)]
        return [x.contiguous(memory_format=self.layout) for x in drawn]

    def weights(self, count: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.shape[1], 1, *self.kernel)
        return [(torch.randn(shape, generator=generator) / max(self.kernel)).to(self.dtype) for _ in range(count)]

    def convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, algorithm=self.algorithm)

    def rounding(self, x: Tensor, weight: Tensor) -> Tensor:
        """How far each output may be from the exact one, in float64."""
        return rounding(x, weight, self.algorithm)


@st.composite
def samples(draw: st.DrawFn, largest: int = 16, largest_kernel: int = 21) -> Sample:
    side, odd = st.integers(1, largest), st.integers(0, largest_kernel // 2).map(lambda i: 2 * i + 1)
    dtype = draw(st.sampled_from(DTYPES))
    return Sample(
        shape=(draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 16, 17))), draw(side), draw(side)),
        kernel=(draw(odd), draw(odd)),
        dtype=dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        # no backend has Fourier transforms in float64
        algorithm=draw(st.sampled_from(("auto", "direct") if dtype == torch.float64 else ("auto", "direct", "fft"))),
        seed=draw(st.integers(0, 2**31)),
    )
