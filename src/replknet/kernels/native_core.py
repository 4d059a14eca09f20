"""The C++ core as Python sees it: its library, structures and instruction sets, and torch's threads for it.

The core (csrc/) knows neither torch nor Python. `native` passes it pointers, memory and torch's own threads.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from replknet.extras import installing
from replknet.kernels.backend import BackendError

VARIABLE = "REPLKNET_ISA"
ALGORITHMS = {"direct": 0, "fft": 1}
# RK_NOT_FINITE of csrc/replknet.h
NOT_FINITE = -3
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CoreCall(ctypes.Structure):
    """rk_call of csrc/replknet.h"""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("n", "c", "h", "w")],
        *[(name, ctypes.c_int32) for name in ("kh", "kw", "dtype", "channels_last", "algorithm")],
        *[(name, ctypes.c_int32) for name in ("lh", "lw", "th", "tw", "rotated")],
    )


class CoreRun(ctypes.Structure):
    """rk_run of csrc/replknet.h"""

    _fields_ = (
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("parallel_for", "workspace", "prepared", "checksums")],
    )


def library_path() -> Path | None:
    """The built core, or None if this installation has none."""
    spec = find_spec("replknet.replknet_native")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


@cache
def library() -> ctypes.CDLL | None:
    """The loaded core, or None if this installation has none."""
    path = library_path()
    if path is None:
        return None
    core = ctypes.CDLL(str(path))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    core.rk_isa_name.restype = ctypes.c_char_p
    core.rk_workspace.argtypes, core.rk_workspace.restype = [pointer, integer, integer], size
    core.rk_prepared.argtypes, core.rk_prepared.restype = [pointer], size
    core.rk_forward.argtypes = [pointer] * 5 + [integer, pointer]
    core.rk_backward.argtypes = [pointer] * 7
    core.rk_checksum.argtypes, core.rk_checksum.restype = [pointer, size, integer], ctypes.c_uint64
    return core


def core() -> ctypes.CDLL:
    """The loaded core.

    Raises:
        BackendError: this installation has no core.
    """
    found = library()
    if found is None:
        raise BackendError("the native kernel was not built with this installation")
    return found


@cache
def warn_missing() -> None:
    """Say, once in a process, that there is no core, what runs instead and how to get one."""
    warnings.warn(
        "replknet's C++ core is missing, so torch's own convolution is used, which is slower for large kernels; on "
        f"Linux with a C++ compiler {installing()} builds it, and REPLKNET_BACKEND=aten stops this warning",
        stacklevel=2,
    )


@cache
def parallel_for() -> int | None:
    """The address of torch's own parallel loop, which torch 2.10 and later export; None means one thread."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not path.exists():
        return None
    found = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
    return ctypes.cast(found, ctypes.c_void_p).value if found is not None else None


def instruction_sets() -> dict[str, bool]:
    """The instruction sets that the core was built for, best first, and whether each runs here."""
    core = library()
    found: dict[str, bool] = {}
    while core is not None and (name := core.rk_isa_name(len(found))) is not None:
        found[name.decode()] = bool(core.rk_isa_runs(len(found)))
    return found


@cache
def instruction_set() -> str:
    """The instruction set that calls run with: the one that REPLKNET_ISA names at the first call, else the best.

    Raises:
        BackendError: there is no core, or REPLKNET_ISA names a set that the core lacks or that does not run here.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is None:
        return next(name for name, runs in _built().items() if runs)
    return _checked(wanted, f"{VARIABLE}={wanted}")


def _built() -> dict[str, bool]:
    found = instruction_sets()
    if not found:
        raise BackendError("the native kernel was not built with this installation")
    return found


def _checked(wanted: str, said: str) -> str:
    found = _built()
    if wanted not in found:
        raise BackendError(f"{said}: this build has {', '.join(found)}")
    if not found[wanted]:
        running = ", ".join(name for name, runs in found.items() if runs)
        raise BackendError(f"{said}: this processor does not have it; it runs {running}")
    return wanted


_by_force: str | None = None


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run all calls of the process with one instruction set, such as "avx2"; for comparisons in one process.

    Raises:
        BackendError: as in `instruction_set`.
    """
    global _by_force
    before, _by_force = _by_force, _checked(name, f"use_instruction_set({name!r})")
    try:
        yield
    finally:
        _by_force = before


def status() -> str:
    """How the core runs here, in one line."""
    found = instruction_sets()
    if not found:
        return (
            f"not built: calls run on aten; on Linux with a C++ compiler {installing()} builds it, or says why with -v"
        )
    others = ", ".join(f"{name}{'' if runs else ' (not on this processor)'}" for name, runs in found.items())
    threads = "torch's threads" if parallel_for() is not None else "one thread: only torch 2.10 and later share theirs"
    return f"{instruction_set()}, {threads}; built for {others}"


def running_set() -> str:
    """The instruction set of a call made now."""
    return _by_force or instruction_set()


def isa_number(name: str) -> int:
    """The core's number of an instruction set."""
    return list(instruction_sets()).index(name)


def checksum(t: Tensor) -> int:
    """The core's checksum of a contiguous tensor's bytes."""
    return core().rk_checksum(t.data_ptr(), t.nbytes, isa_number(instruction_set()))
