"""The C++ core on CPUs: direct kernels and Fourier transforms, vectorised over channels.

The core (csrc/) knows neither torch nor Python: this file hands it pointers, memory and torch's own threads.
What it prepares from the weights (spectra, or taps in another order) is kept from call to call. Neither the
address of the weights nor torch's version counter proves that they are what they were (fused optimisers,
`.data` and numpy change neither; freed addresses come back), so the address only says where to look, and a
checksum of the bytes, taken by the core in each call, decides.
"""

import ctypes
import itertools
import mmap
import os
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from replknet.kernels.backend import Backend, Call
from replknet.kernels.native_plan import BLOCK, Plan, candidates, plan

VARIABLE = "REPLKNET_ISA"
# prepared weights that are kept, bytes
CACHE_BYTES = 512 << 20
# outputs from here on get huge pages where the system offers them: else each is faulted in by 4 KB pages,
# which costs more than the convolution
_HUGE_BYTES = 4 << 20
_ALIGNMENT = 64
# work below this many ns (estimated, one core) is not worth waking other threads for
_ALONE_NS = 10_000
# torch's own channels_last convolution wins for fewer taps than this if x has more than so many elements for each
# tap (docs/decisions/0003-native-core.md); on fewer elements its call costs more, and contiguous it never wins
_FEW_TAPS = 26
_ELEMENTS_A_TAP = 1 << 16
# an output of so many (32 MB) is mapped anew by each call, and torch's is faulted in by 4 KB pages
_MAPPED_ELEMENTS = 1 << 23

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ALGORITHMS = {"direct": 0, "fft": 1}


class _Call(ctypes.Structure):
    """rk_call of csrc/replknet.h"""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("n", "c", "h", "w")],
        *[(name, ctypes.c_int32) for name in ("kh", "kw", "dtype", "channels_last", "algorithm")],
        *[(name, ctypes.c_int32) for name in ("lh", "lw", "th", "tw", "rotated")],
    )


class _Run(ctypes.Structure):
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
def _library() -> ctypes.CDLL | None:
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


@cache
def _parallel_for() -> int | None:
    """The address of torch's own parallel loop, which torch 2.10 and later export; without it, one thread."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not path.exists():
        return None
    found = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
    return ctypes.cast(found, ctypes.c_void_p).value if found is not None else None


def instruction_sets() -> dict[str, bool]:
    """The instruction sets that the core was built for, best first, and whether each runs here."""
    core = _library()
    found: dict[str, bool] = {}
    while core is not None and (name := core.rk_isa_name(len(found))) is not None:
        found[name.decode()] = bool(core.rk_isa_runs(len(found)))
    return found


@cache
def instruction_set() -> str:
    """The instruction set that calls run with: the one that REPLKNET_ISA names at the first call, else the best.

    Raises:
        RuntimeError: there is no core, or REPLKNET_ISA names a set that it does not have or that does not run here.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is None:
        return next(name for name, runs in _built().items() if runs)
    return _checked(wanted, f"{VARIABLE}={wanted}")


def _built() -> dict[str, bool]:
    found = instruction_sets()
    if not found:
        raise RuntimeError("the native kernel was not built with this installation")
    return found


def _checked(wanted: str, said: str) -> str:
    found = _built()
    if wanted not in found:
        raise RuntimeError(f"{said}: this build has {', '.join(found)}")
    if not found[wanted]:
        running = ", ".join(name for name, runs in found.items() if runs)
        raise RuntimeError(f"{said}: this processor does not have it; it runs {running}")
    return wanted


_by_force: str | None = None


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Calls of the whole process run with one instruction set, such as "avx2": to compare them in one process.

    Raises:
        RuntimeError: as `instruction_set`.
    """
    global _by_force
    before, _by_force = _by_force, _checked(name, f"use_instruction_set({name!r})")
    try:
        yield
    finally:
        _by_force = before


def status() -> str:
    """How the core runs here, in a line."""
    found = instruction_sets()
    if not found:
        return "not built: calls run on aten; `pip install -v` shows why the build failed"
    others = ", ".join(f"{name}{'' if runs else ' (not on this processor)'}" for name, runs in found.items())
    threads = "torch's threads" if _parallel_for() is not None else "one thread: torch 2.10 and later share theirs"
    return f"{instruction_set()}, {threads}; built for {others}"


def _aligned(n: int) -> Tensor:
    # the device is named, as torch.device(...) and torch.set_default_device change the default one
    buffer = torch.empty(n + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -buffer.data_ptr() % _ALIGNMENT
    return buffer[start : start + n]


class _Workspace(threading.local):
    """Scratch memory of the calling thread, which grows to what its largest call needs."""

    def __init__(self) -> None:
        self.buffer = _aligned(0)

    def address(self, n: int) -> int:
        if self.buffer.numel() < n:
            self.buffer = _aligned(n)
        return self.buffer.data_ptr()


class Prepared:
    """Weights in the form that the kernels use, a checksum for each block of channels (0: not made yet), and the
    structure by which a call hands them to the core."""

    __slots__ = ("_checksums", "_weights", "nbytes", "run")

    def __init__(self, nbytes: int, blocks: int) -> None:
        self.nbytes = nbytes
        self._weights = _aligned(nbytes)
        self._checksums = torch.zeros(blocks, dtype=torch.int64, device="cpu")
        self.run = _Run(prepared=self._weights.data_ptr(), checksums=self._checksums.data_ptr())


@dataclass(slots=True)
class PreparedCache:
    """Prepared weights by where the weights were. An entry in use is taken out, so no two calls share one."""

    limit: int  # bytes
    size: int = 0
    entries: OrderedDict[tuple[int, int], Prepared] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, key: tuple[int, int], nbytes: int, blocks: int) -> Prepared:
        with self.lock:
            found = self.entries.pop(key, None)
            if found is not None:
                self.size -= found.nbytes
                return found
        return Prepared(nbytes, blocks)

    def give(self, key: tuple[int, int], prepared: Prepared) -> None:
        with self.lock:
            before = self.entries.pop(key, None)
            self.size += prepared.nbytes - (before.nbytes if before is not None else 0)
            self.entries[key] = prepared
            while self.size > self.limit:
                self.size -= self.entries.popitem(last=False)[1].nbytes

    def forget(self, address: int) -> None:
        """Give back the memory of what was prepared from the weights at an address; another call makes it anew."""
        with self.lock:
            for key in [key for key in self.entries if key[0] == address]:
                self.size -= self.entries.pop(key).nbytes


PREPARED = PreparedCache(CACHE_BYTES)
_workspace = _Workspace()


@dataclass(frozen=True, slots=True)
class _Job:
    """What all calls of one shape and plan have in common."""

    call: _Call
    address: int  # of `call`
    isa: int
    blocks: int
    prepared_bytes: int
    workspace_bytes: int  # of all threads
    threads: int
    how: Plan
    form: int  # of the prepared weights: the same number means that jobs can share them


@lru_cache(maxsize=1024)
def _job(
    shape: torch.Size,
    kernel: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    algorithm: str,
    rotated: bool,
    backward: bool,
    isa: str,
    threads: int,
) -> _Job:
    how = plan(shape[2], shape[3], kernel[2], kernel[3], algorithm)
    return _planned(how, shape, kernel, dtype, channels_last, rotated, backward, isa, threads)


def _planned(
    how: Plan,
    shape: torch.Size,
    kernel: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    rotated: bool,
    backward: bool,
    isa: str,
    threads: int,
) -> _Job:
    core = _core()
    kh, kw = kernel[2:]
    call = _Call(
        *shape, kh, kw, _DTYPES[dtype], channels_last, _ALGORITHMS[how.algorithm], *how.lengths, *how.tile, rotated
    )
    blocks = (shape[1] + BLOCK - 1) // BLOCK
    if how.ns * blocks * shape[0] < _ALONE_NS:
        threads = 1
    workspace = core.rk_workspace(ctypes.byref(call), threads, backward)
    prepared = core.rk_prepared(ctypes.byref(call))
    assert min(workspace, prepared) >= 0, f"the core does not take {how} for {shape}, kernel {kernel}"
    index = list(instruction_sets()).index(isa)
    form = _form(kernel, shape[2:], dtype, how, rotated, isa)
    return _Job(call, ctypes.addressof(call), index, blocks, 4 * prepared, workspace, threads, how, form)


# one that was forgotten gets another number, and its weights are prepared once more
@lru_cache(maxsize=4096)
def _form(*what_prepared_weights_depend_on: object) -> int:
    return next(_numbers)


_numbers = itertools.count()


def _core() -> ctypes.CDLL:
    core = _library()
    if core is None:
        raise RuntimeError("the native kernel was not built with this installation")
    return core


def _job_of(x: Tensor, weight: Tensor, algorithm: str, rotated: bool = False, backward: bool = False) -> _Job:
    threads = torch.get_num_threads() if _parallel_for() is not None else 1
    channels_last = not x.is_contiguous()  # the operator hands over one or the other
    isa = _by_force or instruction_set()
    return _job(x.shape, weight.shape, x.dtype, channels_last, algorithm, rotated, backward, isa, threads)


def _complete(run: _Run, job: _Job) -> _Run:
    run.isa, run.threads, run.parallel_for = job.isa, job.threads, _parallel_for()
    run.workspace = _workspace.address(job.workspace_bytes)
    return run


def _with_weights(job: _Job, weight: Tensor, start: Callable[[_Run], int]) -> int:
    """Calls `start` with memory and prepared weights; the number of blocks that were prepared anew."""
    key = weight.data_ptr(), job.form
    prepared = PREPARED.take(key, job.prepared_bytes, job.blocks)
    code = start(_complete(prepared.run, job))
    PREPARED.give(key, prepared)
    assert code >= 0, f"the core answered {code} to {job.how}"
    return code


def _empty_like(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if y.nbytes >= _HUGE_BYTES and (advise := _madvise()) is not None:
        first = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, y.data_ptr() + y.nbytes - first, mmap.MADV_HUGEPAGE)
    return y


@cache
def _madvise() -> Callable[..., int] | None:
    if platform.system() != "Linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def _convolved(job: _Job, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, y: Tensor) -> int:
    """Writes y; the number of blocks of weights that were prepared anew."""
    return _with_weights(
        job,
        weight,
        lambda run: _core().rk_forward(
            job.address,
            ctypes.byref(run),
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            relu,
            y.data_ptr(),
        ),
    )


def run_plan(how: Plan, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Writes the convolution into y the way a plan says, on one thread: to compare plans."""
    job = _planned(how, x.shape, weight.shape, x.dtype, not x.is_contiguous(), False, False, instruction_set(), 1)
    _convolved(job, x, weight, None, False, y)


def checksum(t: Tensor) -> int:
    """The core's checksum of a contiguous tensor's bytes."""
    return _core().rk_checksum(t.data_ptr(), t.nbytes, list(instruction_sets()).index(instruction_set()))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "auto") -> Tensor:
    y = _empty_like(x)
    bias = None if bias is None else bias.contiguous()
    _convolved(_job_of(x, weight, algorithm), x, weight, bias, relu, y)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "auto"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = _empty_like(x) if wanted[0] else None
    dw = None
    job = _job_of(x, weight, algorithm, backward=True)
    # one pass gives both gradients, and transforms each image once, if an image is one tile
    whole = job.how.algorithm == "fft" and job.how.tile == tuple(x.shape[2:])
    both = whole and wanted[0] and wanted[1]
    if dx is not None and not both:
        _convolved(_job_of(x, weight, algorithm, rotated=True), dy, weight, None, False, dx)
    if wanted[1]:
        # taps that only ever see padding are not written
        seen = all(side // 2 < size for side, size in zip(weight.shape[2:], x.shape[2:], strict=True))
        dw = (torch.empty_like if seen else torch.zeros_like)(weight, memory_format=torch.contiguous_format)
        tensors = dy.data_ptr(), x.data_ptr(), weight.data_ptr()
        to_dx, to_dw = dx.data_ptr() if both and dx is not None else None, dw.data_ptr()

        def start(run: _Run) -> int:
            return _core().rk_backward(job.address, ctypes.byref(run), *tensors, to_dx, to_dw)

        if both:
            _with_weights(job, weight, start)
        else:
            code = start(_complete(_Run(), job))
            assert code >= 0, f"the core answered {code} to {job.how}"
    db = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype) if wanted[2] else None
    return dx, dw, db


def _refusal(call: Call) -> str | None:
    if call.device != "cpu":
        return "runs on CPUs only"
    if call.dtype not in _DTYPES:
        return "takes float32, float16 and bfloat16"
    if _library() is None:
        return "was not built with this installation"
    if call.algorithm == "fft" and not any(p.algorithm == "fft" for p in candidates(*call.shape[2:], *call.kernel)):
        return "has no transform long enough for this kernel"
    return None


def _declines(call: Call) -> str | None:
    taps, elements = prod(call.kernel), prod(call.shape)
    many = _ELEMENTS_A_TAP * taps < elements < _MAPPED_ELEMENTS
    if call.channels_last and call.dtype == torch.float32 and taps < _FEW_TAPS and many:
        return f"torch's own is faster for {taps} taps on {elements} elements, channels_last"
    return None


def _explanation(call: Call) -> list[str]:
    """The plan that a call would get, and the best of the others."""
    allowed = [p for p in candidates(*call.shape[2:], *call.kernel) if call.algorithm in ("auto", p.algorithm)]
    return [
        f"instruction set {instruction_set()}, {torch.get_num_threads()} threads; estimates of one core:",
        *(f"{'chosen' if i == 0 else 'not'} {p}" for i, p in enumerate(allowed[:5])),
    ]


BACKEND = Backend(
    name="native", refusal=_refusal, forward=forward, backward=backward, explanation=_explanation, declines=_declines
)
