"""The autotuner: what it tries, what it remembers, and what it does with a file that is no table."""

import json
import threading

import pytest
import torch

from replknet.kernels import triton_tune
from replknet.kernels.triton_plan import DirectTile, PatchTile
from replknet.kernels.triton_tune import Table, autotuned, kind_of

SHIPPED, OTHER, SUMS = PatchTile(), PatchTile(samples=32), DirectTile()
KIND = "forward 64,128,56,56 31x31 bfloat16 nchw"


class Device:
    """Stands for a device on which each tile takes a given time; None: it does not fit."""

    def __init__(self, times):
        self.times = times
        self.tried = []

    def run(self, tile):
        self.tried.append(tile)

    def timer(self, call):
        call()
        return self.times[self.tried[-1]]

    def ask(self, table, kind=KIND, tiles=(SHIPPED, OTHER, SUMS), budget_s=60.0):
        return table.tile(kind, SHIPPED, lambda: tiles, self.run, self.timer, budget_s)


def test_the_fastest_is_taken_and_remembered_across_processes(tmp_path):
    path = tmp_path / "below" / "tiles.json"
    device = Device({SHIPPED: 3.0, OTHER: 2.0, SUMS: 2.5})
    table = Table(path)
    assert device.ask(table) == OTHER
    assert device.tried == [SHIPPED, OTHER, SUMS]
    assert device.ask(table) == OTHER
    assert device.ask(Table(path)) == OTHER
    assert len(device.tried) == 3
    assert Table(path)[KIND] == OTHER
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_tiles_of_both_kinds_come_back_as_they_were(tmp_path):
    path = tmp_path / "tiles.json"
    for kind, tile in (("a", DirectTile(rows=2, splits=3)), ("b", PatchTile(registers=255, near=False))):
        Device({tile: 1.0}).ask(Table(path), kind, (tile,))
        assert Table(path)[kind] == tile


def test_what_does_not_fit_the_device_is_passed_by(tmp_path):
    device = Device({SHIPPED: None, OTHER: 2.0, SUMS: None})
    assert device.ask(Table(tmp_path / "tiles.json")) == OTHER
    none = Device({SHIPPED: None, OTHER: None, SUMS: None})
    with pytest.raises(RuntimeError, match="no tile for backward fits this device; tried: PatchTile"):
        none.ask(Table(tmp_path / "tiles.json"), "backward")


def test_the_first_call_is_bounded_in_time(tmp_path):
    device = Device({SHIPPED: 3.0, OTHER: 2.0, SUMS: 1.0})
    assert device.ask(Table(tmp_path / "tiles.json"), budget_s=-1.0) == SHIPPED
    assert device.tried == [SHIPPED]


def test_processes_that_tune_at_once_keep_what_the_other_found(tmp_path):
    path = tmp_path / "tiles.json"
    one, two = Table(path), Table(path)
    Device({SHIPPED: 1.0}).ask(one, "one", (SHIPPED,))
    Device({OTHER: 1.0}).ask(two, "two", (OTHER,))
    both = Table(path)
    assert (both["one"], both["two"]) == (SHIPPED, OTHER)


def test_threads_time_a_kind_once(tmp_path):
    device = Device({SHIPPED: 3.0, OTHER: 2.0, SUMS: 2.5})
    table = Table(tmp_path / "tiles.json")
    threads = [threading.Thread(target=device.ask, args=(table,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.tried == [SHIPPED, OTHER, SUMS]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        json.dumps({"a": {"kind": "Other"}}),
        json.dumps({"a": {"kind": "PatchTile", "unknown": 1}}),
        '{"a":1}',
    ],
)
def test_a_file_that_is_no_table_is_named_and_written_anew(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="is no table of tiles"):
        table = Table(path)
    with pytest.warns(UserWarning, match="is no table of tiles"):
        Device({SHIPPED: 1.0}).ask(table, tiles=(SHIPPED,))
    assert Table(path)[KIND] == SHIPPED


def test_a_table_that_cannot_be_written_costs_a_warning_and_no_call(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning, match="tiles are timed again in the next process"):
        assert Device({SHIPPED: 1.0}).ask(table, tiles=(SHIPPED,)) == SHIPPED
    assert table[KIND] == SHIPPED


def test_while_a_graph_is_recorded_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = Device({SHIPPED: 1.0})
    table = Table(tmp_path / "tiles.json")
    assert table.tile(KIND, SHIPPED, lambda: (OTHER,), device.run) == SHIPPED
    assert device.tried == []
    # nor remembered
    assert table[KIND] is None


def test_batches_of_about_the_same_size_are_of_one_kind():
    def kind(n):
        return kind_of("forward", (n, 3, 8, 9), (7, 5), torch.float16, False, True)

    assert kind(1) == "forward 1,3,8,9 7x5 float16 nhwc"
    assert kind(32) == kind(63)
    assert kind(64) == kind(1000)
    assert len({kind(n) for n in (1, 2, 4, 8, 16, 32, 64)}) == 7
    tf32, ieee = (kind_of("forward", (1, 3, 8, 9), (7, 5), torch.float32, tf32, False) for tf32 in (True, False))
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


def test_a_table_is_of_a_device_and_a_triton(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    triton_tune.table_of.cache_clear()
    try:
        Device({SHIPPED: 1.0}).ask(triton_tune.table_of(0), tiles=(SHIPPED,))
    finally:
        triton_tune.table_of.cache_clear()
    [file] = (tmp_path / "replknet").iterdir()
    assert file.name.startswith("tiles_nvidia-h100-80gb-hbm3_triton-3.")
