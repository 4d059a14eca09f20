"""The 16 x 16 Toeplitz matrices of a weight, one for each row and column block of the kernel: "strips".

They are the second operand of the products in `triton_patch` and `triton_plane`. Element (k, n) of a matrix is the tap
in column 16 * d + k - n, counted from the middle of the kernel; or zero. A first kernel writes the strips in every
call, since weights change. The strips of weights that do not learn are kept.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from replknet.kernels import prepared
from replknet.kernels.triton_launch import Launch, current_stream
from replknet.kernels.triton_plan import Geometry, PatchTile, PlaneTile, Work

T = TypeVar("T")
_COLUMNS: tl.constexpr = tl.constexpr(16)  # pixels of a patch along a row
_FLAT = 1024  # taps that are compared or copied in a step
_AT_ONCE = 8  # matrices that a program writes in a step


@triton.jit(do_not_specialize=["rows", "programs", "rotated"])
def _strips(
    weight,  # [C, KH, KW]
    strips,  # [C, rows, 16, 16]
    taps,  # for KEEP and KEPT: a copy of the weight that the strips were made of
    rows,  # strip rows times blocks
    programs,  # of a channel
    rotated,  # 1 for the rotated kernel
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KEEP: tl.constexpr,  # write `taps`, too; a channel then has one program
    KEPT: tl.constexpr,  # write nothing for a channel whose weight still has the bits of `taps`
    AT_ONCE: tl.constexpr,
    FLAT: tl.constexpr,
):
    channel = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    weight += channel * (KH * KW)
    taps += channel * (KH * KW)
    changed = 1
    if KEPT:
        changed = 0
        for start in tl.range(0, KH * KW, FLAT):
            tap = start + tl.arange(0, FLAT)
            now = tl.load(weight + tap, mask=tap < KH * KW, other=0.0)
            then = tl.load(taps + tap, mask=tap < KH * KW, other=0.0)
            changed += tl.sum((_bits(now) != _bits(then)).to(tl.int32))
    if changed > 0:
        e = tl.arange(0, _COLUMNS * _COLUMNS)[None, :]
        n, k = e % _COLUMNS, e // _COLUMNS
        if TRANSPOSED:
            n, k = k, n
        for start in tl.range(part * AT_ONCE, rows, programs * AT_ONCE):
            r = start + tl.arange(0, AT_ONCE)[:, None]
            row = r // BLOCKS - (ROWS - 1)
            column = LEFT + r % BLOCKS * _COLUMNS + KW // 2 + (k - n)
            inside = (row >= 0) & (row < KH) & (column >= 0) & (column < KW)
            at = row * KW + column
            at = tl.where(rotated != 0, KH * KW - 1 - at, at)
            tap = tl.load(weight + at, mask=inside, other=0.0)
            tl.store(strips + (channel * rows + r) * (_COLUMNS * _COLUMNS) + e, tap, mask=r < rows)
        if KEEP:
            for start in tl.range(0, KH * KW, FLAT):
                tap = start + tl.arange(0, FLAT)
                now = tl.load(weight + tap, mask=tap < KH * KW, other=0.0)
                tl.store(taps + tap, now, mask=tap < KH * KW)


@triton.jit
def _bits(x):
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


class Strips:
    """The 16 x 16 Toeplitz matrices of a weight, which the kernels read as their second operand.

    If the weight does not learn, its strips are kept with it. The device checks in every call that the weight has not
    changed: it compares bits (docs/decisions/0008-gpu-default.md).
    """

    def __init__(self, call: Work, tile: PatchTile | PlaneTile, g: Geometry) -> None:
        c, (kh, kw) = call.shape[1], call.kernel
        blocks = g.groups * g.blocks
        self._rows = g.strip_rows * blocks
        self._elements = c * self._rows * _COLUMNS.value**2
        self._key = ("triton strips", tile.rows, g.left, blocks, call.kernel, call.dtype, call.rotated)
        self._learns = call.rotated
        constants = {
            "KH": kh,
            "KW": kw,
            "ROWS": tile.rows,
            "BLOCKS": blocks,
            "LEFT": g.left,
            "TRANSPOSED": call.dtype == torch.float32,
            "AT_ONCE": _AT_ONCE,
            "FLAT": _FLAT,
        }
        programs = triton.cdiv(self._rows, _AT_ONCE)
        self._make = Launch(
            _strips,
            c * programs,
            (self._rows, programs, int(call.rotated)),
            {**constants, "KEEP": False, "KEPT": False},
        )
        self._keep, self._compare = (
            Launch(_strips, c, (self._rows, 1, 0), {**constants, "KEEP": True, "KEPT": kept}) for kept in (False, True)
        )

    def of(self, weight: Tensor) -> Tensor:
        """The strips of a weight, in one dimension."""
        if self._learns or not _keeps(weight):
            return self._made(weight)
        stream = current_stream(weight.get_device())
        key = (*self._key, stream)
        forms = prepared.forms_of(weight)
        form = forms.get(key)
        if form is None:
            # the first call keeps no strips: the weight may be a copy that a caller makes anew in every call
            forms[key] = _Kept(prepared.next_use())
            return self._made(weight)
        assert isinstance(form, _Kept)
        form.used = prepared.next_use()
        if form.strips is None:
            nbytes = self._elements * weight.element_size() + weight.nbytes
            prepared.make_room(nbytes)
            form.strips, form.taps = apart(lambda: (self._empty(weight), torch.empty_like(weight)), weight, stream)
            form.nbytes = nbytes
            forms[key] = form
            self._keep(weight, form.strips, form.taps)
        else:
            assert form.taps is not None
            self._compare(weight, form.strips, form.taps)
        return form.strips

    def _made(self, weight: Tensor) -> Tensor:
        strips = self._empty(weight)
        self._make(weight, strips, weight)
        return strips

    def _empty(self, weight: Tensor) -> Tensor:
        return weight.new_empty(self._elements)


@dataclass(slots=True, eq=False)
class _Kept:
    """Kept strips, and a copy of the weight that they were made of; None until the second call."""

    used: int
    nbytes: int = 0
    strips: Tensor | None = None
    taps: Tensor | None = None


@cache
def _allocator() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def apart(allocate: Callable[[], T], like: Tensor, stream: int) -> T:
    """Allocate memory that outlives the call, in another thread.

    For CUDA graphs torch warms up a network with a memory pool of its own, for one thread. It raises an error if memory
    of the pool stays in use.

    Args:
        allocate: makes the tensors.
        like: a tensor on the device.
        stream: the stream on which the tensors will be used.
    """

    def run() -> T:
        if not like.is_cuda:
            return allocate()
        with torch.cuda.device_of(like), torch.cuda.stream(torch.cuda.ExternalStream(stream, like.device)):
            return allocate()

    return _allocator().submit(run).result()


def _keeps(weight: Tensor) -> bool:
    """Whether strips may be kept: not for weights that learn, nor in a CUDA graph, which outlives kept strips."""
    if weight.requires_grad and not torch.is_inference_mode_enabled():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
