"""How the Triton kernels are started: by Triton the first time, and then directly.

Triton's own entry looks at every argument of every call, which takes up to 40 us. What it finds depends here on the
shapes and dtypes alone, since addresses are multiples of 16 (`triton_run.aligned`). So a `Launch` keeps the compiled
kernel that its first call got, and later calls hand it the addresses.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

_address = Tensor.data_ptr
_runtime = triton.knobs.runtime


class _Mode(threading.local):
    # while this is a list, kernels of this thread are compiled and put into it instead of being started
    compiled: list[Any] | None = None


_mode = _Mode()


# a plain one, or one that the compiler knows
Number = Any


def known(number: int) -> Number:
    """A number that is a constant of the compiled kernel; the interpreter takes plain ones."""
    return triton.language.constexpr(number) if not triton.knobs.runtime.interpret else number


def one(number: int) -> Number:
    """A number that the compiler knows if it is 1: what is divided by it is simpler then."""
    return known(1) if number == 1 else number


class Launch:
    """A kernel with its grid and all arguments but the tensors.

    Args:
        kernel: whose parameters are tensors, then numbers, then constants.
        grid: programs.
        numbers: in the order of the parameters.
        constants: by name.
        options: of the compiler: num_warps, num_stages, maxnreg.
    """

    def __init__(
        self, kernel: Any, grid: int, numbers: tuple[Number, ...], constants: dict[str, Any], **options: int | None
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._numbers = numbers
        self._constants = constants
        self._options = options
        # what the compiled kernel gets after the tensors; it ignores the constants, which are part of it
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._direct: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Start the kernel on the current stream. The tensors must be on the current device."""
        # a profiler asks Triton to tell it of each kernel, which only Triton's own entry does
        if self._direct is None or _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls:
            self._first(tensors)
            return
        run, function, metadata, stream_of, device = self._direct
        run(
            *(self._grid, 1, 1, stream_of(device), function, metadata, None, None, None),
            *map(_address, tensors),
            *self._rest,
        )

    def _first(self, tensors: tuple[Tensor, ...]) -> None:
        arguments = (*tensors, *self._numbers)
        if _mode.compiled is not None:
            compiled = self._kernel.warmup(*arguments, grid=(self._grid,), **self._constants, **self._options)
            _mode.compiled.append(compiled)
            return
        compiled = self._kernel[(self._grid,)](*arguments, **self._constants, **self._options)
        # the interpreter has nothing compiled
        if compiled is not None:
            driver = triton.runtime.driver.active
            self._direct = (
                *(compiled.run, compiled.function, compiled.packed_metadata),
                *(driver.get_current_stream, driver.get_current_device()),
            )


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Kernels that this thread would start inside are compiled instead, into the list. Tensors may be on meta."""
    before = _mode.compiled
    found: list[Any] = []
    _mode.compiled = found
    try:
        yield found
    finally:
        _mode.compiled = before


def current_stream(device: int) -> int:
    """A number of the current stream of a device; 0 where there is none."""
    return 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
