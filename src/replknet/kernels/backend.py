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
    """Everything a choice among backends may depend on; no data, no clock."""

    shape: tuple[int, int, int, int]  # x as [N,C,H,W]
    kernel: tuple[int, int]  # height and width, both odd
    dtype: torch.dtype
    device: str  # torch.device.type
    index: int = 0  # of the device among those of its type
    channels_last: bool = False  # layout of x and of the result
    algorithm: str = "auto"  # one of ALGORITHMS

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        device = self.device if self.index == 0 else f"{self.device}:{self.index}"
        return (
            f"x {list(self.shape)} {str(self.dtype).removeprefix('torch.')} {layout} on {device}, "
            f"kernel {self.kernel[0]}x{self.kernel[1]}, algorithm={self.algorithm}"
        )


# compared by identity, so that choices among backends can be remembered
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backend:
    """One implementation of the operator: forward, and all wanted gradients in one call.

    The tensors a backend gets are checked, not empty, on one device, of one dtype and in the layout that
    `Call.channels_last` names. It may return any layout; the operator settles it.
    """

    name: str
    # why it cannot take the call, or None
    refusal: Callable[[Call], str | None]
    # x [N,C,H,W], weight [C,1,Kh,Kw], bias [C] or None, relu, algorithm -> y [N,C,H,W]
    forward: Callable[[Tensor, Tensor, Tensor | None, bool, str], Tensor]
    # dy, x, weight, which of (dx, dw, db) are wanted, algorithm -> those, None where not wanted
    backward: Callable[[Tensor, Tensor, Tensor, list[bool], str], tuple[Tensor | None, Tensor | None, Tensor | None]]
    # false: taken only when forced by name
    automatic: bool = True
    # why the automatic choice passes it by though it could take the call: another one is faster
    declines: Callable[[Call], str | None] | None = None
    # why it would carry out the call as it does, in lines for people
    explanation: Callable[[Call], list[str]] | None = None
