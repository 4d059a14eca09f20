"""How the Triton kernels are started: by Triton the first time, and then directly.

Triton's own entry looks at every argument of every call, which takes up to 40 us. Here its findings depend only on
shapes and dtypes, since addresses are multiples of 16 (`triton_run.aligned`). So a `Launch` keeps the compiled kernel
of its first call, and later calls pass it the addresses.
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
    # while this is a list, this thread compiles kernels into it instead of starting them
    compiled: list[Any] | None = None


_mode = _Mode()


# a plain number, or one that the compiler knows
Number = Any


def known(number: int) -> Number:
    """A number as a constant of the compiled kernel; the interpreter takes plain numbers."""
    return triton.language.constexpr(number) if not triton.knobs.runtime.interpret else number


def one(number: int) -> Number:
    """A number that the compiler knows if it is 1: dividing by it is then simpler."""
    return known(1) if number == 1 else number


class Launch:
    """A kernel with its grid and all arguments but the tensors.

    Args:
        kernel: a kernel whose parameters are tensors, then numbers, then constants.
        grid: number of programs.
        numbers: the numbers, in the order of the parameters.
        constants: the constants, by name.
        options: options of the compiler: num_warps, num_stages, maxnreg.
    """

    def __init__(
        self, kernel: Any, grid: int, numbers: tuple[Number, ...], constants: dict[str, Any], **options: int | None
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._numbers = numbers
        self._constants = constants
        self._options = options
        # the arguments after the tensors; the compiled kernel ignores the constants, which are part of it
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._direct: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Start the kernel on the current stream. The tensors must be on the current device."""
        # a profiler wants a report of each kernel, which only Triton's own entry gives
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
        # the interpreter compiles nothing
        if compiled is not None:
            driver = triton.runtime.driver.active
            self._direct = (
                *(compiled.run, compiled.function, compiled.packed_metadata),
                *(driver.get_current_stream, driver.get_current_device()),
            )


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Inside, this thread compiles kernels into the list instead of starting them. Tensors may be on meta."""
    before = _mode.compiled
    found: list[Any] = []
    _mode.compiled = found
    try:
        yield found
    finally:
        _mode.compiled = before


def current_stream(device: int) -> int:
    """The number of the current stream of a device; 0 without a device."""
    return 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
