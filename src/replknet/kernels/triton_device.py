"""What is known about a CUDA device: its family, what was timed and checked on it, and what does not work there."""

import subprocess
import threading
import warnings
from functools import cache, cached_property

import torch

from replknet.kernels.triton_plan import Family, Tile, family
from replknet.kernels.triton_tune import ON_DEVICE, Table, Timer, autotuned, table_of


class Device:
    """One device of this process.

    Args:
        index: number of the CUDA device; -1 for the CPU, where the interpreter runs and nothing is timed.
    """

    timer: Timer = ON_DEVICE

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cpu" if index < 0 else f"cuda:{index}")
        # `triton_check.check_name` -> why such kernels are not used
        self.broken: dict[str, str] = {}
        # in this process: (kind of calls, tile) compiled ahead, and (kind of calls, relu, tile) that ran
        self.compiled: set[tuple[str, Tile]] = set()
        self.proven: set[tuple[str, bool, Tile]] = set()
        self._lock = threading.Lock()

    @cached_property
    def table(self) -> Table:
        return table_of(self.index)

    @cached_property
    def family(self) -> Family:
        # the interpreter takes the tiles of any family
        return "sm_90" if self.index < 0 else family(torch.cuda.get_device_capability(self.index))

    def may_time(self) -> bool:
        """Whether ways may be timed: the environment allows it, and results need not repeat from run to run."""
        return self.index >= 0 and autotuned() and not torch.are_deterministic_algorithms_enabled()

    def recording(self) -> bool:
        """Whether a CUDA graph is being recorded. Meanwhile nothing may be loaded, timed or compared."""
        return self.index >= 0 and torch.cuda.is_current_stream_capturing()

    def settle(self) -> None:
        """Wait until the current stream has finished its work."""
        if self.index >= 0:
            torch.cuda.current_stream(self.index).synchronize()

    def mark(self, name: str, error: Exception) -> None:
        """Stop using a kind of kernel; the first one gives a warning.

        Raises:
            Exception: `error`, if the device or its memory caused it and not the kernel.
        """
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise error
        try:
            self.settle()
        except RuntimeError:
            # from now on the device answers every call with an error
            raise error from None
        cause = next(iter(str(error).strip().splitlines()), "no reason given")
        with self._lock:
            first = not self.broken
            self.broken[name] = f"{type(error).__name__}: {cause}"
        if first:
            warnings.warn(
                f"on {self.torch_device} a kernel of replknet failed: {name}: {self.broken[name]}; another one or "
                "torch's own convolution, slower for large kernels, replaces it; replknet.doctor() lists all failures",
                RuntimeWarning,
                stacklevel=2,
            )


@cache
def device_at(index: int) -> Device:
    """The device of an index: the same object in the whole process."""
    return Device(index)


@cache
def failures() -> tuple[type[Exception], ...]:
    """The errors of a kernel that cannot be compiled or started: from Triton, and from what Triton calls."""
    found: tuple[type[Exception], ...] = (
        *(RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError),
        # from a Triton whose internals differ from what `triton_launch` expects
        *(AttributeError, TypeError, ValueError, LookupError),
    )
    try:
        from triton.errors import TritonError
    except (ImportError, OSError):  # a broken installation
        return found
    return (*found, TritonError)
