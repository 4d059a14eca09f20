"""What is known of a CUDA device: its family, what was timed and checked on it, and what does not work there."""

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
        index: of the CUDA device; -1 for the CPU, where the interpreter runs and nothing is timed.
    """

    timer: Timer = ON_DEVICE

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cpu" if index < 0 else f"cuda:{index}")
        # why kernels are not used, by `triton_check.check_name`
        self.broken: dict[str, str] = {}
        # kinds of calls with tiles that were compiled ahead, and those that ran, in this process
        self.compiled: set[tuple[str, Tile]] = set()
        self.proven: set[tuple[str, bool, Tile]] = set()
        self._lock = threading.Lock()

    @cached_property
    def table(self) -> Table:
        return table_of(self.index)

    @cached_property
    def family(self) -> Family:
        # what the interpreter is asked for is as good as anything
        return "sm_90" if self.index < 0 else family(torch.cuda.get_device_capability(self.index))

    def may_time(self) -> bool:
        """Whether ways may be timed: the environment allows it, and results need not repeat from run to run."""
        return self.index >= 0 and autotuned() and not torch.are_deterministic_algorithms_enabled()

    def recording(self) -> bool:
        """Whether a CUDA graph is recorded, during which nothing may be loaded, timed or compared."""
        return self.index >= 0 and torch.cuda.is_current_stream_capturing()

    def settle(self) -> None:
        """Wait until the current stream is through."""
        if self.index >= 0:
            torch.cuda.current_stream(self.index).synchronize()

    def mark(self, name: str, error: Exception) -> None:
        """Use a kind of kernel no more; the first time this is said.

        Raises:
            Exception: `error`, if it is of the device or its memory and not of the kernel.
        """
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise error
        try:
            self.settle()
        except RuntimeError:
            # the device answers every call with an error from now on
            raise error from None
        cause = next(iter(str(error).strip().splitlines()), "no reason given")
        with self._lock:
            first = not self.broken
            self.broken[name] = f"{type(error).__name__}: {cause}"
        if first:
            warnings.warn(
                f"on {self.torch_device} torch's own convolution takes the place of replknet's kernels, and is slower "
                f"for large ones: {name}: {self.broken[name]}; replknet.doctor() shows all of it",
                RuntimeWarning,
                stacklevel=2,
            )


@cache
def device_at(index: int) -> Device:
    """The device of that index; one object a process."""
    return Device(index)


@cache
def failures() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be compiled or started raises: Triton's errors, and those of what Triton calls."""
    found: tuple[type[Exception], ...] = (
        *(RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError),
        # of a Triton whose inside is not what `triton_launch` expects
        *(AttributeError, TypeError, ValueError, LookupError),
    )
    try:
        from triton.errors import TritonError
    except (ImportError, OSError):  # a broken installation
        return found
    return (*found, TritonError)
