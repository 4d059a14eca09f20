"""What a backend is: a frozen record of functions, and the call it is asked to take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Algorithm = Literal["auto", "direct", "fft"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)


class BackendError(RuntimeError):
    """No backend takes a call, or what was asked for by name does not run here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Everything that a choice among backends may depend on: no data, no clock.

    Args:
        shape: of x, `[N,C,H,W]`.
        kernel: height and width, both odd.
        dtype: of x and of the weight.
        device: torch.device.type.
        index: number of the device among devices of its type.
        channels_last: layout of x and of the result.
        algorithm: one of `ALGORITHMS`.
    """

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    dtype: torch.dtype
    device: str
    index: int = 0
    channels_last: bool = False
    algorithm: str = "auto"

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

    Args:
        name: what `use_backend` calls it.
        refusal: why it cannot take the call, or None.
        forward: from x `[N,C,H,W]`, weight `[C,1,Kh,Kw]`, bias `[C]` or None, relu and algorithm to y `[N,C,H,W]`.
        backward: from dy, x, weight, which of (dx, dw, db) are wanted, and algorithm to dx, dw, db, each None where not
            wanted.
        automatic: whether the automatic choice asks it; else it is taken only when forced by name.
        declines: why the automatic choice skips it although it could take the call (another is faster), or None.
        explanation: how it would carry out the call and why, in lines for people.
    """

    name: str
    refusal: Callable[[Call], str | None]
    forward: Callable[[Tensor, Tensor, Tensor | None, bool, str], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, list[bool], str], tuple[Tensor | None, Tensor | None, Tensor | None]]
    automatic: bool = True
    declines: Callable[[Call], str | None] | None = None
    explanation: Callable[[Call], list[str]] | None = None
