"""The fastest of some tiles for a kind of call: timed when it first comes to a device, and remembered on disk.

Calls are of one kind if they differ in the number of images alone, and not by a factor of two. The tiles that ship
(`triton_plan`) are taken as they are where nothing may be timed: with REPLKNET_AUTOTUNE=0, while torch asks for
deterministic algorithms, and while a CUDA graph is recorded.
"""

import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch

from replknet.kernels.triton_plan import DirectTile, PatchTile, Tile

VARIABLE = "REPLKNET_AUTOTUNE"
# seconds after which no other tile is compiled and tried for a call; the one that ships is the first
_BUDGET_S = 8.0
# of one tile
_RUNS = 20
_RUNS_S = 0.05
_KINDS = {kind.__name__: kind for kind in (PatchTile, DirectTile)}


@cache
def autotuned() -> bool:
    """Whether the environment allows it; read once.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    found = os.environ.get(VARIABLE) or "1"
    if found not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (the tiles that ship) or 1 (time them on first use), got {found!r}")
    return found == "1"


def kind_of(
    direction: str,
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    tf32: bool,
    channels_last: bool,
) -> str:
    """The name of a kind of calls, by which its tile is remembered."""
    n, c, h, w = shape
    images = 1 << (min(n, 64).bit_length() - 1)
    number = "tf32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")
    layout = "nhwc" if channels_last else "nchw"
    return f"{direction} {images},{c},{h},{w} {kernel[0]}x{kernel[1]} {number} {layout}"


class Table:
    """The tiles that were found on one device, in a JSON file.

    Args:
        path: of the file, which need not exist. What cannot be read in it is found anew, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._tiles = self._read()

    def _read(self) -> dict[str, Tile]:
        if not self._path.exists():
            return {}
        try:
            written = json.loads(self._path.read_text())
            return {name: _tile(entry) for name, entry in written.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{self._path} is no table of tiles ({error}); they are timed anew", stacklevel=2)
            return {}

    def __getitem__(self, kind: str) -> Tile | None:
        return self._tiles.get(kind)

    def tile(
        self,
        kind: str,
        shipped: Tile,
        tiles: Callable[[], Sequence[Tile]],
        run: Callable[[Tile], object],
        timer: Callable[[Callable[[], object]], float | None] | None = None,
        budget_s: float = _BUDGET_S,
    ) -> Tile:
        """The fastest tile, remembered if it was found before; while a CUDA graph is recorded, one that is known.

        Args:
            kind: of calls.
            shipped: the tile that is taken where nothing can be timed.
            tiles: what may be tried; the first is tried even if that takes all of the time.
            run: makes the call with a tile.
            timer: what a call takes, or None if the device does not have what it needs; by default on the current
                CUDA stream.
            budget_s: seconds after which no other tile is tried.

        Raises:
            RuntimeError: the device can run none of them.
        """
        if (known := self._tiles.get(kind)) is not None:
            return known
        if timer is None:
            if torch.cuda.is_current_stream_capturing():
                return shipped
            timer = device_ms
        with self._lock:  # gradients come from other threads
            if (known := self._tiles.get(kind)) is not None:
                return known
            end = time.monotonic() + budget_s
            times: dict[Tile, float] = {}
            for tile in tiles():
                if times and time.monotonic() > end:
                    break
                taken = timer(partial(run, tile))
                if taken is not None:
                    times[tile] = taken
            if not times:
                raise RuntimeError(f"no tile for {kind} fits this device; tried: {', '.join(map(str, tiles()))}")
            best = min(times, key=times.__getitem__)
            self._tiles[kind] = best
            self._write()
            return best

    def _write(self) -> None:
        # another process may have found others meanwhile
        self._tiles = self._read() | self._tiles
        written = {name: {"kind": type(tile).__name__, **asdict(tile)} for name, tile in sorted(self._tiles.items())}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(written, file, indent=1)
            os.replace(file.name, self._path)
        except OSError as error:
            warnings.warn(f"tiles are timed again in the next process: {self._path}: {error}", stacklevel=2)


def _tile(entry: dict[str, object]) -> Tile:
    fields = dict(entry)
    # what a file holds has no types; fields that a tile does not have raise TypeError
    return _KINDS[str(fields.pop("kind"))](**fields)  # type: ignore[arg-type]


@cache
def table_of(device: int) -> Table:
    """That of a CUDA device, in `~/.cache/replknet`, or below XDG_CACHE_HOME: for its name and for this Triton."""
    import triton

    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "replknet"
    return Table(folder / f"tiles_{name}_triton-{triton.__version__}.json")


def device_ms(call: Callable[[], object]) -> float | None:
    """The median time of a call on the current CUDA stream, or None if it needs more than the device has."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return None
    times: list[float] = []
    end = time.monotonic() + _RUNS_S
    while len(times) < 3 or (len(times) < _RUNS and time.monotonic() < end):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)
