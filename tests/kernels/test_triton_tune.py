"""The autotuner: what it tries, what it remembers, and what it does with a file that is no table."""

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import pytest
import torch

from replknet.kernels import triton_tune
from replknet.kernels.triton_plan import DirectTile, PatchTile, PlaneTile, Work
from replknet.kernels.triton_tune import Entry, Table, autotuned, kind_of, timed

SHIPPED, OTHER, SUMS = PatchTile(), PatchTile(samples=32), DirectTile()
TORCH = "torch"
KIND = "forward 64,128,56,56 31x31 bfloat16 nchw"


class Clock:
    """Stands for a device on which each way takes a given time; None: the device does not have what it needs."""

    def __init__(self, times):
        self.times = times
        self.tried = []
        self.last = None

    def run(self, way):
        self.last = way

    def once(self, call):
        call()
        self.tried.append((self.last, "once"))
        return self.times[self.last]

    def median(self, call):
        call()
        self.tried.append((self.last, "median"))
        return self.times[self.last]

    def ask(self, tiles=(SHIPPED, OTHER, SUMS), budget_s=60.0, with_torch=True, compile_tile=lambda tile: None):
        torch_run = (lambda: self.run(TORCH)) if with_torch else None
        return timed(tiles, self.run, torch_run, compile_tile, self, budget_s)


def waited_for(condition):
    """Another thread makes it true; one that never does is an error."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "another thread did nothing"
        time.sleep(0.01)


def test_the_shipped_tile_comes_first_and_then_torch():
    clock = Clock({SHIPPED: 3.0, OTHER: 2.0, SUMS: 2.5, TORCH: 2.1})
    entry = clock.ask()
    assert [way for way, _ in clock.tried] == [SHIPPED, TORCH, TORCH, OTHER, SUMS]
    assert entry == Entry(OTHER, 2.0, 2.1, 0)
    assert entry.best == OTHER
    assert Clock({SHIPPED: 3.0, TORCH: 2.1}).ask((SHIPPED,)).best is None


def test_a_search_of_cudnn_in_the_first_call_is_not_held_against_torch():
    clock = Clock({SHIPPED: 2.0})
    times = iter([50.0, 1.0])
    clock.once = lambda call: next(times)
    clock.times[TORCH] = 1.0
    assert clock.ask((SHIPPED,)).best is None


def test_what_does_not_fit_the_device_is_passed_by():
    assert Clock({SHIPPED: None, OTHER: 2.0, SUMS: None, TORCH: 9.0}).ask() == Entry(OTHER, 2.0, 9.0)
    assert Clock({SHIPPED: None, OTHER: None, SUMS: None, TORCH: 9.0}).ask() == Entry(None, None, 9.0)
    with pytest.raises(RuntimeError, match="no tile fits this device; tried: PatchTile"):
        Clock({SHIPPED: None, OTHER: None, SUMS: None}).ask(with_torch=False)


def test_tiles_beyond_the_first_are_bounded_in_time():
    clock = Clock({SHIPPED: 3.0, OTHER: 2.0, SUMS: 1.0, TORCH: 9.0})
    assert clock.ask(budget_s=-1.0) == Entry(SHIPPED, 3.0, 9.0, left=2)


def test_a_tile_that_is_not_compiled_in_time_is_left_for_the_next_process(tmp_path, monkeypatch):
    done = threading.Event()
    given_s = []

    def time_is_up_after_the_first(jobs, timeout):
        given_s.append(timeout)
        return wait(jobs, return_when=FIRST_COMPLETED)

    monkeypatch.setattr(triton_tune, "wait", time_is_up_after_the_first)
    clock = Clock({SHIPPED: 3.0, OTHER: 2.0, SUMS: 1.0, TORCH: 9.0})
    entry = clock.ask(budget_s=60.0, compile_tile=lambda tile: done.wait(60) if tile == SUMS else None)
    done.set()
    assert 0 < given_s[0] < 60
    assert entry == Entry(OTHER, 2.0, 9.0, left=1)
    table = Table(tmp_path / "ways.json")
    table.put(KIND, entry)
    everything = (SHIPPED, OTHER, SUMS)
    assert table.known(KIND, True, everything) == entry
    # compiled meanwhile
    assert Table(table.path).known(KIND, True, everything) is None


def test_tiles_are_compiled_at_the_same_time():
    both = threading.Barrier(2, timeout=60)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(triton_tune.os, "cpu_count", lambda: 2)
    try:
        clock = Clock({SHIPPED: 3.0, OTHER: 2.0, SUMS: 1.0, TORCH: 9.0})
        assert clock.ask(compile_tile=lambda tile: both.wait()).left == 0
    finally:
        monkey.undo()


def test_a_long_first_step_is_explained_once_on_stderr(monkeypatch, capsys):
    # another thread writes, so nothing is taken away from what it writes to
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(triton_tune, "_PATIENCE_S", 3600.0)
    patience = triton_tune._Patience()
    with patience.spending():
        pass
    assert stderr.getvalue() == ""
    monkeypatch.setattr(triton_tune, "_PATIENCE_S", 0.0)
    with patience.spending():
        waited_for(lambda: stderr.getvalue().endswith("\n"))
    with patience.spending():
        pass
    assert stderr.getvalue() == (
        "replknet: compiling and timing kernels, once for this GPU; replknet.warm(model, example) does it ahead\n"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tile", [DirectTile(rows=2, splits=3), PatchTile(registers=255, near=False), PlaneTile()])
def test_entries_come_back_as_they_were(tmp_path, tile):
    path = tmp_path / "below" / "ways.json"
    for entry in (Entry(tile, 1.0, 2.0, 3), Entry(None, None, 2.0), Entry(tile, 1.0, None)):
        Table(path).put(KIND, entry)
        assert Table(path)[KIND] == entry
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == ["ways.json"]


def test_an_entry_is_known_only_for_who_may_take_it(tmp_path):
    table = Table(tmp_path / "ways.json")
    table.put(KIND, Entry(OTHER, 2.0, None))
    assert table.known(KIND, False, (SHIPPED,)) is not None
    # timed by name, without torch
    assert table.known(KIND, True, (SHIPPED,)) is None
    # its kind of kernel is broken here
    assert table.known(KIND, False, (SUMS,)) is None
    table.put(KIND, Entry(None, None, 2.0))
    assert table.known(KIND, True, ()) is not None
    assert table.known(KIND, False, (SHIPPED,)) is None


def test_processes_that_time_at_once_keep_what_the_other_found(tmp_path):
    path = tmp_path / "ways.json"
    one, two = Table(path), Table(path)
    with one.alone():
        one.put("one", Entry(SHIPPED, 1.0, 2.0))
    with two.alone():
        assert two["one"] == Entry(SHIPPED, 1.0, 2.0)
        two.put("two", Entry(OTHER, 1.0, 2.0))
    both = Table(path)
    assert (both["one"], both["two"]) == (Entry(SHIPPED, 1.0, 2.0), Entry(OTHER, 1.0, 2.0))


def test_one_process_waits_for_the_other_and_reads_what_it_found(tmp_path):
    path = tmp_path / "ways.json"
    program = f"""
import sys, time
from pathlib import Path
from replknet.kernels.triton_tune import Entry, Table
table = Table(Path({str(path)!r}))
with table.alone():
    print("in", flush=True)
    time.sleep(1)
    table.put("theirs", Entry(None, None, 2.0))
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    table = Table(path)
    assert table["theirs"] is None
    with table.alone():
        assert table["theirs"] == Entry(None, None, 2.0)
    assert other.wait() == 0
    other.stdout.close()


def test_a_process_that_hangs_with_the_lock_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_tune, "_LOCK_S", 0.05)
    path = tmp_path / "ways.json"
    with Table(path).alone(), Table(path).alone():
        pass


def test_a_table_that_cannot_be_written_costs_a_warning_and_no_call(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "ways.json")
    with table.alone(), pytest.warns(UserWarning, match="the next process times kernels again"):
        table.put(KIND, Entry(SHIPPED, 1.0, 2.0))
    assert table[KIND] == Entry(SHIPPED, 1.0, 2.0)


def test_batches_of_about_the_same_size_are_of_one_kind():
    def kind(n, **changes):
        fields = {"shape": (n, 3, 8, 9), "kernel": (7, 5), "dtype": torch.float16, "device": 0, "channels_last": True}
        return kind_of("forward", Work(**{**fields, **changes}))

    assert kind(1) == "forward 1,3,8,9 7x5 float16 nhwc"
    assert kind(32) == kind(63)
    assert kind(64) == kind(1000)
    assert len({kind(n) for n in (1, 2, 4, 8, 16, 32, 64)}) == 7
    tf32, ieee = (kind(1, dtype=torch.float32, tf32=tf32, channels_last=False) for tf32 in (True, False))
    assert (tf32, ieee) == ("forward 1,3,8,9 7x5 tf32 nchw", "forward 1,3,8,9 7x5 float32 nchw")


def test_the_variable_is_0_or_1(monkeypatch):
    try:
        for value, expected in (("0", False), ("1", True), ("", True)):
            monkeypatch.setenv("REPLKNET_AUTOTUNE", value)
            autotuned.cache_clear()
            assert autotuned() is expected
        monkeypatch.setenv("REPLKNET_AUTOTUNE", "yes")
        autotuned.cache_clear()
        with pytest.raises(ValueError, match=r"REPLKNET_AUTOTUNE must be 0 .* or 1 .*, got 'yes'"):
            autotuned()
    finally:
        monkeypatch.undo()
        autotuned.cache_clear()


def test_a_table_is_of_a_device_a_triton_and_a_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    # of an earlier version, which knew no torch
    old = tmp_path / "replknet" / "tiles_nvidia-h100-80gb-hbm3_triton-3.8.0.json"
    old.parent.mkdir()
    old.write_text(json.dumps({KIND: {"kind": "PatchTile", "samples": 64}}))
    triton_tune.table_of.cache_clear()
    try:
        table = triton_tune.table_of(0)
        assert table[KIND] is None
        table.put(KIND, Entry(SHIPPED, 1.0, 2.0))
    finally:
        triton_tune.table_of.cache_clear()
    [file] = (tmp_path / "replknet").glob("ways*")
    assert file.name.startswith("ways_nvidia-h100-80gb-hbm3_triton-3.")
    assert f"_torch-{torch.__version__}".replace("+", "-") in file.name
    assert file.name.endswith(f"_kernels-{triton_tune.kernels_digest()}.json")
    assert old.exists()


def test_what_was_found_with_other_kernels_is_not_taken(tmp_path):
    source = Path(triton_tune.__file__).parent
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    assert triton_tune.kernels_digest(tmp_path) == triton_tune.kernels_digest()
    # every file that has kernels counts, and no other
    for path in sorted(tmp_path.glob("triton_*.py")):
        before, text = triton_tune.kernels_digest(tmp_path), path.read_text()
        path.write_text(text + "\n")
        assert (triton_tune.kernels_digest(tmp_path) != before) == ("@triton.jit" in text), path.name
