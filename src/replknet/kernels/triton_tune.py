"""The fastest way for a kind of call: timed at the first such call on a device, and remembered on disk.

The ways are Triton's kernels with some tiles, and torch's own convolution. Calls are of one kind if a way that is fast
for one of them is fast for the others. Within a kind, numbers of images differ by less than a factor of two, or are 64
and more. In a layer whose maps change in size, sides differ by less than a factor of 1.5, or are 16 and less. With
REPLKNET_AUTOTUNE=0 nothing is timed.
"""

import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from replknet.kernels.triton_plan import DirectTile, PatchTile, PlaneTile, Tile, Work

VARIABLE = "REPLKNET_AUTOTUNE"
# seconds for the tiles after the shipped one
_BUDGET_S = 2.0
# the part of these seconds for compiling
_COMPILING = 0.8
# most calls and seconds for timing one way
_RUNS = 20
_RUNS_S = 0.05
# torch's convolution is timed by a single call if it is slower than the shipped tile by this factor
_HOPELESS = 3.0
# seconds of compiling and timing after which a line says why the first step takes long
_PATIENCE_S = 5.0
# seconds to wait for another process that is timing; after that it is taken to hang
_LOCK_S = 60.0
# the files with kernels
_KERNELS = ("direct", "layout", "patch", "plane", "strips")
_KINDS = {kind.__name__: kind for kind in (PatchTile, DirectTile, PlaneTile)}


class Timer(Protocol):
    """Times calls, ms."""

    def once(self, call: Callable[[], object]) -> float:
        """The time of a single call."""

    def median(self, call: Callable[[], object]) -> float | None:
        """The median of several calls after an untimed one; None if the device lacks what the call needs."""


@cache
def autotuned() -> bool:
    """Whether the environment allows timing; read once.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    found = os.environ.get(VARIABLE) or "1"
    if found not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (no timing) or 1 (timing on first use), got {found!r}")
    return found == "1"


def kind_of(direction: str, work: Work, any_size: bool = False) -> str:
    """The name of a kind of calls, under which its fastest way is remembered.

    Args:
        direction: "forward", "dx" or "dw".
        work: any call of the kind.
        any_size: whether the layer's maps change in size; calls of nearly one size are then of one kind.
    """
    n, c, h, w = work.shape
    images = 1 << (min(n, 64).bit_length() - 1)
    sides = (_rounded(h), _rounded(w)) if any_size else (h, w)
    number = "tf32" if work.tf32 else str(work.dtype).removeprefix("torch.")
    layout = "nhwc" if work.channels_last else "nchw"
    size = ",".join(map(str, (images, c, *sides)))
    size += "~" if any_size else ""
    return f"{direction} {size} {work.kernel[0]}x{work.kernel[1]} {number} {layout}"


def _rounded(side: int) -> int:
    """The side, rounded up to one of 16, 24, 32, 48, 64, 96, ..."""
    power = 1 << max(4, (side - 1).bit_length() - 1)
    return next(s for s in (power, power * 3 // 2, 2 * power) if s >= side)


@dataclass(frozen=True)
class Entry:
    """What was timed for a kind of calls."""

    tile: Tile | None  # the fastest; None if the device can run none
    ms: float | None
    torch_ms: float | None  # None if torch's convolution was not timed
    left: int = 0  # tiles that were not tried, since time ran out

    @property
    def best(self) -> Tile | None:
        """The fastest way; None is torch's own convolution."""
        return self.tile if self.torch_ms is None or (self.ms or self.torch_ms) < self.torch_ms else None


class Table:
    """What was timed and checked on one device, in a JSON file.

    Args:
        path: the file, which need not exist. If it cannot be read, a warning says so, and everything is timed anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        # kinds that this process has timed; of others it tries the tiles that an earlier process left out
        self._here: set[str] = set()
        self.entries: dict[str, Entry] = {}
        self.checks: dict[str, str] = {}  # `triton_check.check_name` -> "right", or what was wrong
        self._read()

    def _read(self) -> None:
        """Take over the contents of the file; this process keeps what it found itself."""
        if not self.path.exists():
            return
        try:
            written = json.loads(self.path.read_text())
            entries = {name: _entry(fields) for name, fields in written["kinds"].items()}
            checks = {str(name): str(found) for name, found in written["checks"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            warnings.warn(f"{self.path} is not a table of tiles ({error!r}); tiles are timed anew", stacklevel=2)
            return
        self.entries = entries | {kind: self.entries[kind] for kind in self._here if kind in self.entries}
        self.checks = checks | self.checks

    def __getitem__(self, kind: str) -> Entry | None:
        return self.entries.get(kind)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread or process times anything. The results of others are read first."""
        # twenty modules, for timing alone
        from filelock import FileLock, Timeout

        with self._lock, ExitStack() as held:
            # if the folder allows no writing or no locks, or another process hangs, each process times for itself
            with suppress(OSError, Timeout, NotImplementedError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{self.path}.lock", timeout=_LOCK_S))
            self._read()
            yield

    def put(self, kind: str, entry: Entry) -> None:
        self._here.add(kind)
        self.entries[kind] = entry
        self._write()

    def put_check(self, name: str, found: str) -> None:
        self.checks[name] = found
        self._write()

    def known(self, kind: str, with_torch: bool, tiles: Sequence[Tile]) -> Entry | None:
        """The entry of a kind, or None if it must be timed anew.

        An entry needs a time of torch's convolution (`with_torch`) or else of a tile, and its tile must be of a usable
        kind. If an earlier process left tiles out, the kind is timed anew: these tiles are compiled by now.
        """
        entry = self.entries.get(kind)
        if entry is None or (entry.torch_ms if with_torch else entry.tile) is None:
            return None
        usable = entry.tile is None or type(entry.tile) in map(type, tiles)
        return entry if usable and (kind in self._here or not entry.left) else None

    def _write(self) -> None:
        kinds = {kind: _fields(entry) for kind, entry in sorted(self.entries.items())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump({"kinds": kinds, "checks": self.checks}, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"cannot write {self.path}: {error}; the next process times kernels again", stacklevel=2)


def _fields(entry: Entry) -> dict[str, object]:
    tile = None if entry.tile is None else {"kind": type(entry.tile).__name__, **asdict(entry.tile)}
    return {"tile": tile, "ms": entry.ms, "torch_ms": entry.torch_ms, "left": entry.left}


def _entry(fields: dict[str, object]) -> Entry:
    # the contents of a file have no types; fields that a tile lacks raise TypeError
    tile = fields.pop("tile")
    if tile is not None:
        tile = dict(tile)  # type: ignore[call-overload]
        tile = _KINDS[str(tile.pop("kind"))](**tile)
    found = Entry(tile=tile, **fields)  # type: ignore[arg-type]
    times = [ms for ms in (found.ms, found.torch_ms) if ms is not None]
    if not times or not all(isinstance(ms, float) for ms in times) or (tile is None) != (found.ms is None):
        raise ValueError(f"{fields} has no times")
    return found


def timed(
    tiles: Sequence[Tile],
    run: Callable[[Tile], object],
    torch_run: Callable[[], object] | None,
    compile_tile: Callable[[Tile], object],
    timer: Timer,
    budget_s: float = _BUDGET_S,
) -> Entry:
    """Time some ways of a call: the first tile, then torch's convolution, then the other tiles while there is time.

    Args:
        tiles: the tiles that may be tried; the first is the shipped one.
        run: makes the call with a tile.
        torch_run: makes the call with torch's convolution; None if that is not wanted.
        compile_tile: compiles what a tile needs, in any thread.
        timer: times a call.
        budget_s: seconds for all tiles but the first.

    Raises:
        RuntimeError: the device can run none of the tiles, and torch's convolution is not wanted.
    """
    times: dict[Tile, float] = {}

    def time_tile(tile: Tile) -> None:
        if (taken := timer.median(partial(run, tile))) is not None:
            times[tile] = taken

    time_tile(tiles[0])
    torch_ms = None if torch_run is None else _torch_ms(torch_run, min(times.values(), default=None), timer)
    start = time.monotonic()
    end = start + budget_s
    left = list(tiles[1:])
    for tile in _compiled_in_time(left, compile_tile, start + _COMPILING * budget_s):
        if time.monotonic() > end:
            break
        time_tile(tile)
        left.remove(tile)
    if not times:
        if torch_ms is None:
            raise RuntimeError(f"no tile fits this device; tried: {', '.join(map(str, tiles))}")
        return Entry(None, None, torch_ms, len(left))
    best = min(times, key=times.__getitem__)
    return Entry(best, times[best], torch_ms, len(left))


def _torch_ms(run: Callable[[], object], best: float | None, timer: Timer) -> float:
    # the first call includes cuDNN's search for an algorithm
    if best is not None and timer.once(run) > _HOPELESS * best and (second := timer.once(run)) > _HOPELESS * best:
        return second
    taken = timer.median(run)
    assert taken is not None, "torch's convolution takes every call"
    return taken


def _compiled_in_time(tiles: Sequence[Tile], compile_tile: Callable[[Tile], object], end: float) -> list[Tile]:
    """Compile tiles, as many at once as there are processors; returns those that are done in time, in order."""
    if not tiles or time.monotonic() > end:
        return []
    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # compilers let other threads run
    jobs = {tile: pool.submit(compile_tile, tile) for tile in tiles}
    wait(jobs.values(), timeout=max(0.0, end - time.monotonic()))
    # running jobs go on, and the next process finds their kernels compiled; an error comes up again when the tile runs
    pool.shutdown(wait=False, cancel_futures=True)
    return [tile for tile, job in jobs.items() if job.done() and not job.cancelled()]


class _Patience:
    """Says once that kernels are being compiled and timed, if that takes long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent = 0.0
        self._said = False

    @contextmanager
    def spending(self) -> Iterator[None]:
        start = time.monotonic()
        alarm = threading.Timer(max(0.0, _PATIENCE_S - self._spent), self._say)
        alarm.daemon = True
        if not self._said:
            alarm.start()
        try:
            yield
        finally:
            alarm.cancel()
            with self._lock:
                self._spent += time.monotonic() - start

    def _say(self) -> None:
        with self._lock:
            if self._said:
                return
            self._said = True
        print(
            "replknet: compiling and timing kernels, once for this GPU; replknet.warm(model, example) does it ahead",
            file=sys.stderr,
            flush=True,
        )


patience = _Patience()


def kernels_digest(folder: Path = Path(__file__).parent) -> str:
    """A digest of the kernels' source files, which exist because Triton needs them."""
    found = sha256()
    for name in _KERNELS:
        found.update((folder / f"triton_{name}.py").read_bytes())
    return found.hexdigest()[:8]


@cache
def table_of(device: int) -> Table:
    """The table of a CUDA device, in `~/.cache/replknet` or below XDG_CACHE_HOME.

    Its file is named after the device, Triton, torch and the source of our kernels. Times and checks with others do not
    hold.
    """
    import triton

    parts = (
        torch.cuda.get_device_name(device).lower(),
        f"triton-{triton.__version__}",
        f"torch-{torch.__version__}",
        f"kernels-{kernels_digest()}",
    )
    name = "_".join("".join(c if c.isalnum() or c == "." else "-" for c in part) for part in parts)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "replknet"
    return Table(folder / f"ways_{name}.json")


class _OnDevice:
    """Times calls on the current CUDA stream."""

    def once(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def median(self, call: Callable[[], object]) -> float | None:
        from triton.runtime.errors import OutOfResources

        try:
            call()
        except OutOfResources:
            return None
        times: list[float] = []
        end = time.monotonic() + _RUNS_S
        while len(times) < 3 or (len(times) < _RUNS and time.monotonic() < end):
            times.append(self.once(call))
        return median(times)


ON_DEVICE = _OnDevice()
