"""The default on GPUs: what is taken, and what happens where kernels fail. The device and its clock are made up."""

import json
import subprocess
import time
import warnings

import pytest
import torch

from made import PATCH, SUMS, TORCH, made_device
from replknet.kernels import Call, choose, forced, measured, reference, triton, triton_choice, use_backend
from replknet.kernels.triton_choice import Choice
from replknet.kernels.triton_plan import Work
from replknet.kernels.triton_tune import kind_of

BRAIN = torch.bfloat16


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a device, and sends there what the choice asks of one."""

    def make(times, tiles=(PATCH, SUMS), **how):
        return made_device(monkeypatch, tmp_path / "ways.json", times, tiles, **how)

    return make


def tensors(k=13, dtype=BRAIN, n=2, h=20, w=21):
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n, 3, h, w, generator=random).to(dtype) for _ in range(2))
    return x, torch.randn(3, 1, k, k, generator=random).to(dtype) / k, dy


def right(y, x, weight):
    torch.testing.assert_close(y, reference.forward(x, weight, None, False), rtol=2e-2, atol=2e-2)


def last_ways(device, choice, x, weight, dy=None):
    """The ways that a call, and its gradients, go once all is decided."""
    ways = []
    device.ran.clear()
    right(choice.forward(x, weight, None, False), x, weight)
    ways.append(device.ran[-1])
    if dy is not None:
        for wanted in ([True, False, False], [False, True, False]):
            choice.backward(dy, x, weight, wanted)
            ways.append(device.ran[-1])
    return ways


def test_the_fastest_way_is_taken_and_torchs_is_one_of_them(made):
    x, weight, dy = tensors()
    device = made({PATCH: 2.0, SUMS: 3.0, TORCH: 1.0})
    choice = Choice(measured=True)
    assert last_ways(device, choice, x, weight, dy) == [TORCH] * 3
    assert {kind.split()[0] for kind in device.table.entries} == {"forward", "dx", "dw"}
    device.timed.clear()
    assert last_ways(device, choice, x, weight, dy) == [TORCH] * 3
    assert device.timed == []


def test_a_tile_is_taken_where_it_is_faster_also_by_the_next_process(made):
    x, weight, dy = tensors()
    device = made({PATCH: 2.0, SUMS: 1.0, TORCH: 2.5})
    assert last_ways(device, Choice(measured=True), x, weight, dy) == [SUMS] * 3
    device = made({})  # whose clock knows nothing
    assert last_ways(device, Choice(measured=True), x, weight, dy) == [SUMS] * 3
    assert device.timed == []


def test_a_slow_torch_is_called_twice_and_no_more(made):
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 30.0})
    assert last_ways(device, Choice(measured=True), x, weight) == [PATCH]
    assert device.timed == [(PATCH, "median"), (TORCH, "once"), (TORCH, "once"), (SUMS, "median")]
    [entry] = device.table.entries.values()
    assert (entry.tile, entry.ms, entry.torch_ms) == (PATCH, 1.0, 30.0)


def compiler_error():
    from triton.runtime.errors import PTXASError

    return PTXASError("ptxas: Unknown option")


FAILURES = {
    "no compiler": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "no headers": lambda: subprocess.CalledProcessError(1, ["gcc", "main.c", "-o", "cuda_utils.so"]),
    "no driver": lambda: AssertionError("libcuda.so cannot found!"),
    "ptxas": compiler_error,
    "inside": lambda: AttributeError("'CompiledKernel' object has no attribute 'run'"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("timing", [True, False])
def test_a_kernel_that_fails_costs_one_warning_and_torch_goes_on(made, name, timing):
    error = FAILURES[name]()
    x, weight, dy = tensors()
    device = made({PATCH: 1.0, SUMS: 1.0, TORCH: 9.0}, raises={PATCH: error, SUMS: error})
    device.timing = timing
    choice = Choice(measured=True)
    cause = str(error).splitlines()[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert last_ways(device, choice, x, weight, dy) == [TORCH] * 3
        assert last_ways(device, choice, *tensors(dtype=torch.float16)) == [TORCH] * 3
    assert [one.category for one in caught] == [RuntimeWarning]
    assert "on cpu a kernel of replknet failed" in str(caught[0].message)
    assert f"{type(error).__name__}: {cause}" in str(caught[0].message)
    # kernels that failed are not tried again
    before = device.ran.count(PATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last_ways(device, choice, *tensors(h=40))
    assert device.ran.count(PATCH) <= before


def test_wrong_numbers_are_found_and_remembered(made):
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0}, wrong=(PATCH,))
    with pytest.warns(RuntimeWarning, match="WrongNumbers: an error of .* times what arithmetic allows"):
        assert last_ways(device, Choice(measured=True), x, weight) == [SUMS]
    assert device.table.checks["forward direct bfloat16"] == "right"
    assert device.table.checks["forward patch bfloat16"].startswith("an error of")
    # the next process believes it
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    with pytest.warns(RuntimeWarning, match="WrongNumbers"):
        assert last_ways(device, Choice(measured=True), *tensors(h=40)[:2]) == [SUMS]
    assert PATCH not in device.ran


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None),
        (RuntimeError("Triton Error [CUDA]: out of memory"), None),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), RuntimeError("CUDA error")),
    ],
)
def test_errors_of_the_device_or_its_memory_are_raised(made, error, dead):
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 1.0, TORCH: 1.0}, raises={PATCH: error})
    choice = Choice(measured=True)
    device.dead = None

    def die(tile, start=device._start):
        device.dead = dead
        start(tile)

    device._start = die
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error), match=str(error).split(".")[0].replace("[", r"\[")):
            choice.forward(x, weight, None, False)
    assert device.broken == {}


def test_while_a_graph_is_recorded_only_what_was_decided_before_is_taken(made):
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    choice = Choice(measured=True)
    device.graph = True
    assert last_ways(device, choice, x, weight) == [TORCH]
    assert device.ran == [TORCH]
    device.graph = False
    assert last_ways(device, choice, x, weight) == [PATCH]
    device.graph = True
    assert last_ways(device, choice, x, weight) == [PATCH]
    assert device.ran == [PATCH]


@pytest.mark.parametrize(
    ("k", "dtype", "way"),
    [(13, BRAIN, PATCH), (13, torch.float16, PATCH), (11, BRAIN, TORCH), (13, torch.float32, TORCH)],
)
def test_where_nothing_may_be_timed_large_kernels_in_16_bits_take_patches(made, k, dtype, way):
    x, weight, dy = tensors(k, dtype)
    device = made({})
    device.timing = False
    assert last_ways(device, Choice(measured=True), x, weight, dy) == [way] * 3
    assert device.timed == []
    # compared with the definition all the same
    assert (device.table.checks != {}) == (way is PATCH)


def test_by_name_an_error_is_an_error_and_torch_is_no_way(made):
    x, weight, _ = tensors()
    device = made({PATCH: 2.0, SUMS: 3.0, TORCH: 1.0})
    assert last_ways(device, Choice(measured=False), x, weight) == [PATCH]
    assert TORCH not in device.ran
    # what the device would choose is not known while a graph is recorded
    device = made({PATCH: 2.0, SUMS: 1.0})
    choice = Choice(measured=False)
    device.graph = True
    assert last_ways(device, choice, *tensors(h=30)[:2]) == [PATCH]
    device.graph = False
    assert last_ways(device, choice, *tensors(h=30)[:2]) == [SUMS]
    device = made({PATCH: 2.0}, raises={PATCH: RuntimeError("ptxas fell over")})
    with pytest.raises(RuntimeError, match="ptxas fell over"):
        Choice(measured=False).forward(*tensors(h=40)[:2], None, False)
    assert device.ran == [PATCH]


def test_what_was_timed_by_name_is_timed_with_torch_for_the_default(made):
    x, weight, _ = tensors()
    device = made({PATCH: 2.0, SUMS: 3.0, TORCH: 1.0})
    Choice(measured=False).forward(x, weight, None, False)
    assert [entry.torch_ms for entry in device.table.entries.values()] == [None]
    assert last_ways(device, Choice(measured=True), x, weight) == [TORCH]


def test_a_device_with_less_than_a_tile_needs_takes_another_without_a_warning(made):
    from triton.runtime.errors import OutOfResources

    x, weight, _ = tensors()
    too_large = OutOfResources(200_000, 101_376, "shared memory")
    device = made({SUMS: 2.0, TORCH: 9.0}, raises={PATCH: too_large})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_ways(device, Choice(measured=True), x, weight) == [SUMS]
        device = made({}, tiles=(PATCH,), raises={PATCH: too_large})
        device.timing = False
        assert last_ways(device, Choice(measured=True), *tensors(h=40)[:2]) == [TORCH]
    assert device.broken == {}


def test_a_tensor_that_is_not_on_a_boundary_is_copied(made):
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    addresses = []
    run_of = triton_choice.run_of

    def noting(tile, work):
        inside = run_of(tile, work)
        return lambda x, *rest: (addresses.append(x.data_ptr()), inside(x, *rest))[1]

    triton_choice.run_of = noting
    right(Choice(measured=True).forward(shifted, weight, None, False), x, weight)
    assert shifted.data_ptr() % 16
    assert addresses
    assert not any(address % 16 for address in addresses)
    assert device.ran[-1] == PATCH
    addresses.clear()
    Choice(measured=True).backward(shifted, x, weight, [True, False, False])
    assert addresses
    assert not any(address % 16 for address in addresses)


def test_calls_of_other_layouts_and_switches_are_decided_for_themselves(made, monkeypatch):
    x, weight, _ = tensors(dtype=torch.float32)
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    choice = Choice(measured=True)
    for arguments in (
        (x, weight, None, False),
        (x.contiguous(memory_format=torch.channels_last), weight, None, False),
        (x, weight, torch.zeros(3), False),
        (x, weight, None, True),
    ):
        choice.forward(*arguments)
    assert len(choice._runs) == 4
    assert {kind.split()[-1] for kind in device.table.entries} == {"nchw", "nhwc"}
    monkeypatch.setattr(triton_choice, "allows_tf32", lambda: False)
    monkeypatch.setattr("replknet.kernels.triton_run.allows_tf32", lambda: False)
    choice.forward(x, weight, None, False)
    assert {kind.split()[-2] for kind in device.table.entries} == {"tf32", "float32"}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choice.forward(x, weight, None, False)
    assert len(choice._runs) == 6


def test_a_kernel_larger_than_the_map_is_cut(made):
    x, weight, dy = tensors(31, h=5, w=7)
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    choice = Choice(measured=True)
    assert last_ways(device, choice, x, weight) == [PATCH]
    assert [kind.split()[2] for kind in device.table.entries] == ["9x13"]
    dx, dw, db = choice.backward(dy, x, weight, [True, True, True])
    for got, wanted in zip((dx, dw, db), reference.backward(dy, x, weight, [True] * 3), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_maps_of_about_the_same_size_are_of_one_kind_where_they_change():
    def kind(h, w, n=2, any_size=True):
        return kind_of("forward", Work(shape=(n, 8, h, w), kernel=(13, 13), dtype=BRAIN, device=0), any_size)

    assert kind(100, 152) == kind(97, 150) == "forward 2,8,128,192~ 13x13 bfloat16 nchw"
    assert kind(100, 152) != kind(100, 200)
    assert len({kind(h, h, any_size=False) for h in range(1, 99)}) == 98
    assert len({kind(h, h) for h in range(17, 400)}) == 10


def test_the_default_of_a_cuda_device_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])

    def call(**changes):
        return Call(**{"shape": (1, 2, 8, 8), "kernel": (7, 7), "dtype": BRAIN, "device": "cuda", **changes})

    assert forced() is None
    assert choose(call()).name == "measured"
    # an old card beside a new one
    assert choose(call(index=1)).name == "aten"
    assert "capability 8.0 or more, cuda:1 has 7.5" in measured.BACKEND.refusal(call(index=1))
    # an infinity reaches more outputs than those that see it
    assert choose(call(algorithm="direct")).name == "aten"
    assert choose(call(dtype=torch.float64)).name == "aten"
    with use_backend("aten"):
        assert choose(call()).name == "aten"
    with use_backend("triton"):
        assert choose(call()).name == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert (
        triton.BACKEND.refusal(call(shape=(3, 2, 8, 8))) == "runs on NVIDIA devices only; this torch is for AMD devices"
    )


def test_what_the_gradients_need_is_compiled_while_the_forward_pass_is_decided(made):
    x, weight, dy = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    choice = Choice(measured=True)
    last_ways(device, choice, x, weight)
    assert PATCH not in device.built
    weight.requires_grad_()
    x.requires_grad_()
    choice = Choice(measured=True)
    choice.forward(x, weight, None, False)
    triton_choice._background().submit(lambda: None).result()
    # a limit for a thread that does nothing
    deadline = time.monotonic() + 60
    while device.built.count(PATCH) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert device.built.count(PATCH) == 2
    assert {kind.split()[0] for kind, _ in device.compiled} == {"dx", "dw"}
    choice.backward(dy, x, weight, [True, True, False])
    # others of that kind find it
    Choice(measured=True).forward(x, weight, None, False)
    assert device.built.count(PATCH) == 2


def test_a_process_that_waits_for_the_lock_waits_for_nothing_else(made, monkeypatch):
    """Else it could hold up a process that waits for a collective of it, and has the lock."""
    x, weight, _ = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    order = []
    alone, settle = device.table.alone, device.settle
    monkeypatch.setattr(device, "settle", lambda: (order.append("settled"), settle()))
    monkeypatch.setattr(device.table, "alone", lambda: (order.append("lock"), alone())[1])
    Choice(measured=True).forward(x, weight, None, False)
    assert order == ["settled", "lock"]


def test_calls_can_be_noted_for_a_warm_up(made):
    x, weight, dy = tensors()
    device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    choice = Choice(measured=True)
    with choice.noting() as found:
        assert last_ways(device, choice, x, weight, dy) == [TORCH] * 3
    assert [question.direction for question in found] == ["forward", "dx", "dw"]
    assert device.timed == []
    assert last_ways(device, choice, x, weight, dy) == [PATCH] * 3


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[1]", '{"kinds": {"a": {"tile": null}}, "checks": {}}', '{"forward": {}}']
)
def test_a_file_that_is_no_table_is_said_and_written_anew(made, tmp_path, text):
    (tmp_path / "ways.json").write_text(text)
    x, weight, _ = tensors()
    with pytest.warns(UserWarning, match=r"ways.json is not a table of tiles"):
        device = made({PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})
    with pytest.warns(UserWarning, match="is not a table of tiles"):
        assert last_ways(device, Choice(measured=True), x, weight) == [PATCH]
    assert len(json.loads((tmp_path / "ways.json").read_text())["kinds"]) == 1
