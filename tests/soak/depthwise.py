"""Random calls of the operator against float64: y, dx, dw and db, on every instruction set that runs here."""

from random import Random

import torch
from torch import Tensor

from oracle import excess_of
from replknet.kernels import native_core
from replknet.ops import depthwise_conv2d
from soak.campaign import Campaign

DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
# products of a case: the reference takes about a second for more
_PRODUCTS = 4e6


def _side(random: Random, most: int) -> int:
    """From 1 to `most`, small ones more often."""
    return min(most, int(most ** random.random() + 0.5))


def _shape(random: Random) -> tuple[int, int, int, int, int, int]:
    """n, c, h, w and an odd kernel, which may be larger than the map."""
    while True:
        n, c = _side(random, 5), _side(random, 70)
        h, w = _side(random, 130), _side(random, 130)
        kh, kw = 2 * _side(random, 32) - 1, 2 * _side(random, 32) - 1
        if random.random() < 0.5:
            kw = kh
        if n * c * h * w * kh * kw < _PRODUCTS * 10 and n * c * h * w < 2e5:
            return n, c, h, w, kh, kw


def _laid_out(random: Random, x: Tensor) -> tuple[str, Tensor]:
    """`x` in one of the memory layouts that networks make."""
    last = torch.channels_last
    n, c, h, w = x.shape
    name = random.choice(["contiguous", "channels_last", "channels of channels_last", "rows", "transposed", "negated"])
    if name == "channels_last":
        return name, x.contiguous(memory_format=last)
    if name == "channels of channels_last":
        wide = torch.randn(n, c + 5, h, w).to(x.dtype).contiguous(memory_format=last)
        wide[:, 2 : 2 + c] = x
        return name, wide[:, 2 : 2 + c]
    if name == "rows":
        return name, torch.nn.functional.pad(x, (0, 0, 1, 2))[:, :, 1 : 1 + h]
    if name == "transposed":
        return name, x.transpose(2, 3).contiguous().transpose(2, 3)
    if name == "negated":
        return name, torch.imag(torch.complex(x, -x).conj()) if x.dtype in (torch.float32, torch.float64) else x
    return name, x


def check(random: Random) -> str | None:
    """One case, on each instruction set."""
    n, c, h, w, kh, kw = _shape(random)
    torch.manual_seed(random.getrandbits(32))
    dtype = random.choice(DTYPES)
    # the largest and smallest values that leave room for the products in float16
    scale = 1.0 if dtype == torch.float16 else 10.0 ** random.choice([0, 0, 0, -12, 12])
    sparse = random.choice([None, None, 0.05])
    x, dy = (torch.randn(n, c, h, w, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(c, 1, kh, kw, dtype=torch.float64) / max(kh, kw), torch.randn(c, dtype=torch.float64)
    if sparse is not None:
        x, dy, weight = (t * (torch.rand(t.shape) < sparse) for t in (x, dy, weight))
    x, weight, bias, dy = ((t * s).to(dtype) for t, s in ((x, scale), (weight, 1), (bias, scale), (dy, scale)))
    (layout, x), (of_dy, dy) = _laid_out(random, x), _laid_out(random, dy)
    with_bias, relu = random.random() < 0.5, random.random() < 0.3
    algorithm = random.choice(["auto", "direct"] if dtype == torch.float64 else ["auto", "direct", "fft"])
    threads = random.choice([1, 2, 3])
    what = (
        f"[{n},{c},{h},{w}] {layout}, dy {of_dy}, kernel {kh}x{kw}, {dtype}, {algorithm}, scale {scale:g}, "
        f"density {sparse}, bias {with_bias}, relu {relu}, threads {threads}"
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for isa in (name for name, runs in native_core.instruction_sets().items() if runs):
            with native_core.use_instruction_set(isa):
                wrong = _wrong(x, weight, bias if with_bias else None, dy, relu, algorithm)
            if wrong is not None:
                return f"{isa}: {wrong}: {what}"
    finally:
        torch.set_num_threads(before)
    return None


def _wrong(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, relu: bool, algorithm: str) -> str | None:
    leaves = [t.detach().requires_grad_() for t in (x, weight, x.new_zeros(len(weight)))]
    # gradients without the ReLU, whose mask would follow the sign of a rounding error
    dx, dw, db = torch.autograd.grad(depthwise_conv2d(*leaves, algorithm=algorithm), leaves, dy)
    y = depthwise_conv2d(x, weight, bias, relu, algorithm)
    got = {"y": y, "dx": dx, "dw": dw, "db": db}
    for name, excess in excess_of(got, x, weight, dy, algorithm, bias, relu).items():
        if not excess <= 1:
            return f"{name} has {excess:.2f} times the error that arithmetic allows"
    return None


CAMPAIGN = Campaign("depthwise", "is the operator what float64 says, whatever the shape, layout and dtype", check)
