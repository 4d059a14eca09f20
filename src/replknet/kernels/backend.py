"""What a backend is: a frozen record of functions, and the call it is asked to take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Algorithm = Literal["auto", "direct", "fft"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Everything that a choice among backends may depend on: no data, no clock."""

    shape: tuple[int, int, int, int]  # x as [N,C,H,W]
    kernel: tuple[int, int]  # height and width, both odd
    dtype: torch.dtype
    device: str  # torch.device.type
    index: int = 0  # number of the device among devices of its type
    channels_last: bool = False  # layout of x and of the result
    algorithm: str = "auto"  # one of ALGORITHMS

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        device = self.device if self.index == 0 else f"{self.device}:{self.index}"
        return (
            f"x {list(self.shape)} {str(self.dtype).removeprefix('torch.')} {layout} on {device}, "
            f"kernel {self.kernel[0]}x{self.kernel[1]}, algorithm={self.algorithm}"
        )


# compared by identity, so that choices among backends can be cached
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backend:
    """One implementation of the operator: forward, and all wanted gradients in one call.

    The operator checks the tensors first. They are not empty, share one device and one dtype, and have the layout that
    `Call.channels_last` names. A backend may return any layout; the operator converts it.
    """

    name: str
    # why it cannot take the call, or None
    refusal: Callable[[Call], str | None]
    # x [N,C,H,W], weight [C,1,Kh,Kw], bias [C] or None, relu, algorithm -> y [N,C,H,W]
    forward: Callable[[Tensor, Tensor, Tensor | None, bool, str], Tensor]
    # dy, x, weight, which of (dx, dw, db) are wanted, algorithm -> dx, dw, db; None where not wanted
    backward: Callable[[Tensor, Tensor, Tensor, list[bool], str], tuple[Tensor | None, Tensor | None, Tensor | None]]
    # false: taken only when forced by name
    automatic: bool = True
    # why the automatic choice skips it although it could take the call (another is faster), or None
    declines: Callable[[Call], str | None] | None = None
    # how it would carry out the call and why, in lines for people
    explanation: Callable[[Call], list[str]] | None = None
