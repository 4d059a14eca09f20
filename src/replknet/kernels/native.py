"""The C++ core on CPUs: direct kernels and Fourier transforms, vectorised over channels.

The core prepares the weights (spectra, or taps in another order), and `prepared` keeps the result with them. In each
call the core takes a checksum of the weights' bytes, which shows whether the kept result still belongs to them.

The direct kernels multiply the zeros of the padding, too. A weight that is not finite, or such a sum in the gradient
for the weights, would give NaN where torch gives none. So torch's own convolution takes these calls.
"""

import ctypes
import itertools
import mmap
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import torch
from torch import Tensor

from replknet.kernels import aten, native_core, prepared
from replknet.kernels.backend import Backend, Call
from replknet.kernels.native_core import ALGORITHMS, DTYPES, NOT_FINITE, CoreCall, CoreRun
from replknet.kernels.native_plan import BLOCK, Plan, candidates, plan, reach

# outputs from this size on get huge pages where the system offers them: page faults of 4 KB pages would cost more than
# the convolution
_HUGE_BYTES = 4 << 20
_ALIGNMENT = 64
# calls below this estimate (ns on one core) stay on one thread: waking others would cost more
_ALONE_NS = 10_000
# torch's own channels_last convolution wins with fewer taps than this, if x has more elements than this for each tap
# (docs/decisions/0003-native-core.md); with fewer elements its call costs more, and on contiguous x it never wins
_FEW_TAPS = 26
_ELEMENTS_A_TAP = 1 << 16
# from this output size on (32 MB) each call maps new memory, and torch loses by page faults of 4 KB pages
_MAPPED_ELEMENTS = 1 << 23


def _aligned(n: int) -> Tensor:
    # the device is named because torch.device(...) and torch.set_default_device change the default
    buffer = torch.empty(n + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -buffer.data_ptr() % _ALIGNMENT
    return buffer[start : start + n]


class _Workspace(threading.local):
    """Scratch memory of the calling thread; it grows to the need of the largest call."""

    def __init__(self) -> None:
        # made by the first call: this module may be imported inside torch.export, whose tensors have no memory
        self.buffer: Tensor | None = None

    def address(self, n: int) -> int:
        if self.buffer is None or self.buffer.numel() < n:
            self.buffer = _aligned(n)
        return self.buffer.data_ptr()


_workspace = _Workspace()


class _Weights:
    """Prepared weights, a checksum for each block of channels (0: not prepared yet), and a `CoreRun` with both."""

    __slots__ = ("_checksums", "_job", "_run", "_weights", "address", "nbytes", "used")

    def __init__(self, nbytes: int, blocks: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._weights = _aligned(nbytes)
        self._checksums = torch.zeros(blocks, dtype=torch.int64, device="cpu")
        self._run = CoreRun(prepared=self._weights.data_ptr(), checksums=self._checksums.data_ptr())
        self._job: _Job | None = None
        self.address = ctypes.addressof(self._run)

    def for_job(self, job: "_Job") -> None:
        """Complete the `CoreRun` for a job."""
        if self._job is not job:
            _complete(self._run, job)
            self._job = job
        # each thread has its own workspace, which may have grown
        self._run.workspace = _workspace.address(job.workspace_bytes)


@dataclass(frozen=True, slots=True)
class _Job:
    """What all calls of one shape and plan share."""

    call: CoreCall
    address: int  # of `call`
    isa: int
    blocks: int
    prepared_bytes: int
    workspace_bytes: int  # for all threads together
    threads: int
    how: Plan
    form: int  # jobs with equal numbers can share prepared weights
    huge: bool  # whether an output is worth huge pages


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
    core = native_core.core()
    kh, kw = kernel[2:]
    call = CoreCall(
        *shape, kh, kw, DTYPES[dtype], channels_last, ALGORITHMS[how.algorithm], *how.lengths, *how.tile, rotated
    )
    blocks = (shape[1] + BLOCK - 1) // BLOCK
    if how.ns * blocks * shape[0] < _ALONE_NS:
        threads = 1
    workspace = core.rk_workspace(ctypes.byref(call), threads, backward)
    nbytes = 4 * core.rk_prepared(ctypes.byref(call))
    assert min(workspace, nbytes) >= 0, f"the core does not take {how} for {shape}, kernel {kernel}"
    # maps on which the kernel reaches equally far share prepared weights; with transforms a tile that is not the whole
    # map begins before its outputs, which changes the prepared weights
    sides = tuple(zip(shape[2:], (kh, kw), how.tile, strict=True))
    reaches = tuple(reach(size, side) for size, side, _ in sides)
    whole = tuple(tile == size for size, _, tile in sides) if how.algorithm == "fft" else ()
    form = _form(kernel, dtype, rotated, isa, how.algorithm, how.lengths, reaches, whole)
    return _Job(
        call,
        ctypes.addressof(call),
        native_core.isa_number(isa),
        blocks,
        nbytes,
        workspace,
        threads,
        how,
        form,
        huge=prod(shape) * dtype.itemsize >= _HUGE_BYTES,
    )


# a form that the cache dropped gets a new number, and its weights are prepared once more
@lru_cache(maxsize=4096)
def _form(*what_prepared_weights_depend_on: object) -> int:
    return next(_numbers)


_numbers = itertools.count()


def _job_of(x: Tensor, weight: Tensor, algorithm: str, rotated: bool = False, backward: bool = False) -> _Job:
    threads = torch.get_num_threads() if native_core.parallel_for() is not None else 1
    channels_last = not x.is_contiguous()  # the operator passes contiguous or channels_last tensors
    isa = native_core.running_set()
    return _job(x.shape, weight.shape, x.dtype, channels_last, algorithm, rotated, backward, isa, threads)


def _complete(run: CoreRun, job: _Job) -> CoreRun:
    run.isa, run.threads, run.parallel_for = job.isa, job.threads, native_core.parallel_for()
    return run


def _taken(forms: prepared.Forms, job: _Job) -> _Weights:
    """The prepared weights of a job, taken out of `forms`: an earlier call's, or new and still empty ones."""
    weights = forms.pop(job.form, None)
    if not isinstance(weights, _Weights):
        prepared.make_room(job.prepared_bytes)
        weights = _Weights(job.prepared_bytes, job.blocks)
    weights.used = prepared.next_use()
    weights.for_job(job)
    return weights


def _empty_like(x: Tensor, job: _Job) -> Tensor:
    y = torch.empty_like(x)
    if job.huge and (advise := _madvise()) is not None:
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
    """Write y; returns the number of blocks of weights that were prepared anew."""
    forms = prepared.forms_of(weight)
    weights = _taken(forms, job)
    to_bias = None if bias is None else bias.data_ptr()
    code = native_core.core().rk_forward(
        job.address, weights.address, x.data_ptr(), weight.data_ptr(), to_bias, relu, y.data_ptr()
    )
    forms[job.form] = weights
    if code == NOT_FINITE:
        y.copy_(aten.forward(x, weight.flip(2, 3) if job.call.rotated else weight, bias, relu))
        return job.blocks
    assert code >= 0, f"the core answered {code} to {job.how}"
    return code


def run_plan(how: Plan, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Write the convolution into y by a given plan, on one thread; for comparing plans."""
    isa = native_core.instruction_set()
    job = _planned(how, x.shape, weight.shape, x.dtype, not x.is_contiguous(), False, False, isa, 1)
    _convolved(job, x, weight, None, False, y)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, algorithm: str = "auto") -> Tensor:
    job = _job_of(x, weight, algorithm)
    y = _empty_like(x, job)
    _convolved(job, x, weight, None if bias is None else bias.contiguous(), relu, y)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], algorithm: str = "auto"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    job = _job_of(x, weight, algorithm, backward=True)
    dx = _empty_like(x, job) if wanted[0] else None
    dw = None
    # if an image is one tile, one pass gives both gradients and transforms each image once
    whole = job.how.algorithm == "fft" and job.how.tile == tuple(x.shape[2:])
    both = whole and wanted[0] and wanted[1]
    if dx is not None and not both:
        _convolved(_job_of(x, weight, algorithm, rotated=True), dy, weight, None, False, dx)
    if wanted[1]:
        # the core does not write taps that meet only padding
        seen = all(side // 2 < size for side, size in zip(weight.shape[2:], x.shape[2:], strict=True))
        dw = (torch.empty_like if seen else torch.zeros_like)(weight, memory_format=torch.contiguous_format)
        _write_gradients(job, dy, x, weight, dx if both else None, dw)
    db = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype) if wanted[2] else None
    return dx, dw, db


def _write_gradients(job: _Job, dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dw: Tensor) -> int:
    """Write dw, and dx if given; returns the number of blocks of weights prepared anew, which only dx needs."""
    tensors = dy.data_ptr(), x.data_ptr(), weight.data_ptr()
    if dx is not None:
        forms = prepared.forms_of(weight)
        weights = _taken(forms, job)
        code = native_core.core().rk_backward(job.address, weights.address, *tensors, dx.data_ptr(), dw.data_ptr())
        forms[job.form] = weights
    else:
        run = _complete(CoreRun(workspace=_workspace.address(job.workspace_bytes)), job)
        code = native_core.core().rk_backward(job.address, ctypes.byref(run), *tensors, None, dw.data_ptr())
    if code == NOT_FINITE:
        dw.copy_(aten.weight_gradient(dy, x, weight))
        return 0
    assert code >= 0, f"the core answered {code} to {job.how}"
    return code


def _refusal(call: Call) -> str | None:
    if call.device != "cpu":
        return "runs on CPUs only"
    if call.dtype not in DTYPES:
        return "takes float32, float16 and bfloat16"
    if native_core.library() is None:
        return "was not built with this installation"
    if call.algorithm == "fft" and not any(p.algorithm == "fft" for p in candidates(*call.shape[2:], *call.kernel)):
        return "has no transform long enough for this kernel"
    return None


def misses_core(call: Call) -> bool:
    """Whether a call is the core's to take, and this installation has none."""
    return call.device == "cpu" and call.dtype in DTYPES and native_core.library() is None


def _declines(call: Call) -> str | None:
    taps, elements = prod(call.kernel), prod(call.shape)
    many = _ELEMENTS_A_TAP * taps < elements < _MAPPED_ELEMENTS
    if call.channels_last and call.dtype == torch.float32 and taps < _FEW_TAPS and many:
        return f"torch's own convolution is faster for {taps} taps on {elements} elements, channels_last"
    return None


def _explanation(call: Call) -> list[str]:
    """The plan that a call would get, and the next best ones."""
    allowed = [p for p in candidates(*call.shape[2:], *call.kernel) if call.algorithm in ("auto", p.algorithm)]
    return [
        f"instruction set {native_core.instruction_set()}, {torch.get_num_threads()} threads; estimates for one core:",
        *(f"{'chosen' if i == 0 else 'not'} {p}" for i, p in enumerate(allowed[:5])),
    ]


BACKEND = Backend(
    name="native", refusal=_refusal, forward=forward, backward=backward, explanation=_explanation, declines=_declines
)
