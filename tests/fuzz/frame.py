"""Runs the inputs of a fuzz target in another process, where a crash, a hang or a gigabyte is seen."""

import atexit
import gc
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch

from soak.campaign import Campaign

# what one input may take: seconds of the processor, seconds in all, bytes
SECONDS, PATIENCE, BYTES = 10, 60, 1024**3
# the machine has other work: no input gets more address space
ROOM = 6 * 1024**3
# letters of an error that a person reads
LETTERS = 1_000


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file, or other input, that users give us.

    Args:
        name: its name on the command line of `python -m soak`.
        question: what is asked.
        make: writes an input, drawn from the random numbers alone, into an empty folder; returns its path.
        read: does with the input what a user does.
        allowed: the errors that it may raise.
    """

    name: str
    question: str
    make: Callable[[Random, Path], Path]
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...]


def campaign(target: Target) -> Campaign:
    """A target as a campaign, so that `make soak` runs it."""
    return Campaign(target.name, target.question, partial(_check, target.name))


def _check(name: str, random: Random) -> str | None:
    # targets take turns: a process that waits would keep its memory
    for other in [other for other in _WORKERS if other != name]:
        _WORKERS.pop(other).stop()
    worker = _WORKERS.get(name)
    if worker is None:
        worker = _WORKERS[name] = _Worker(name)
    found = worker.tried(random.getrandbits(64))
    if worker.ended:
        del _WORKERS[name]
    return found


class _Worker:
    """A process that tries inputs of one target, one after another, until one ends it."""

    def __init__(self, name: str) -> None:
        _start_server()
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(name, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.ended = False

    def tried(self, seed: int) -> str | None:
        """What is wrong with the input of a seed, or None."""
        self._pipe.send(seed)
        try:
            if self._pipe.poll(PATIENCE):
                found: str | None = self._pipe.recv()
                return found
            what = f"took more than {PATIENCE} s"
        except EOFError:
            self._process.join()
            what = f"ended the process with {self._process.exitcode}"
        self.stop()
        return what

    def stop(self) -> None:
        self.ended = True
        self._process.kill()
        self._process.join()


# a server that has imported everything and computed nothing: its children start at once, and have no threads
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fuzz"])
_WORKERS: dict[str, _Worker] = {}


@cache
def _start_server() -> None:
    # it takes its path from the environment alone
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@atexit.register
def _stop() -> None:
    for worker in _WORKERS.values():
        worker.stop()


def _serve(name: str, pipe: Connection) -> None:
    from fuzz import TARGETS

    torch.set_num_threads(1)
    # what the server imported never goes: else each collection looks through all of it
    gc.freeze()
    room = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            return
        with TemporaryDirectory(prefix="fuzz-") as folder:
            pipe.send(tried(TARGETS[name], Random(seed), Path(folder)))


def tried(target: Target, random: Random, folder: Path) -> str | None:
    """Make an input in an empty folder, and read it.

    Returns:
        What is wrong, or None: an error that is not allowed, one that no person can read, or too much time or memory.
    """
    path = target.make(random, folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _status("VmRSS"), time.process_time()
    try:
        target.read(path)
    except target.allowed as error:
        text = str(error)
        if not text or "\n" in text or len(text) > LETTERS:
            return f"an error must be one line of at most {LETTERS} letters, got {text[:LETTERS]!r}"
    except BaseException:
        return traceback.format_exc()
    seconds, more = time.process_time() - start, _status("VmHWM") - before
    if seconds > SECONDS:
        return f"took {seconds:.1f} s of the processor, more than {SECONDS}"
    if more > BYTES:
        return f"took {more / BYTES:.2f} GiB of memory, more than one"
    return None


def _status(field: str) -> int:
    """A size of this process, bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def run_here(name: str, seed: int, folder: Path) -> str | None:
    """An input in this process, for a debugger; `seed` is that of the campaign."""
    from fuzz import TARGETS

    os.makedirs(folder, exist_ok=True)
    return tried(TARGETS[name], Random(Random(f"{name} {seed}").getrandbits(64)), folder)
