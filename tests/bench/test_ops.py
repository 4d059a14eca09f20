"""The depthwise benchmark on cases that take milliseconds: what is measured, refused, recorded and concluded."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.functional import conv2d

from replknet import kernels
from replknet.bench import networks, ops, overhead, records, runtimes, tables
from replknet.bench.cases import SUITES, Case, Stack, Suite, Target, chosen, grid
from replknet.bench.gate import excess, truths
from replknet.bench.networks import Network
from replknet.bench.records import Record, append
from replknet.kernels import BACKENDS, reference
from replknet.ops import depthwise_conv2d
from replknet.timing import Timing

SETTINGS = ops.Settings(runs=2, limit_s=1.0, peak_gflops=100.0, peak_from="as stated")
TINY = Case(
    "tiny", (2, 11, 6, 5), 7, targets=(Target("forward", "torch nhwc", 0.001), Target("gradients", "torch", 1e9))
)
STACK = Stack("stack", (TINY, Case("other", (1, 3, 4, 4), 3), TINY))
SUITE = Suite("is it small", (TINY, STACK), runtimes=True)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", SUITE)


@pytest.fixture
def registered(monkeypatch):
    """A function that puts a backend before all others."""

    def register(backend):
        for module in ("replknet.kernels", "replknet.bench.ops"):
            monkeypatch.setattr(f"{module}.BACKENDS", (backend, *BACKENDS))

    return register


def measured(case=TINY, whats=("forward",), suite=SUITE):
    return list(ops.measure("tiny", suite, [case], whats, SETTINGS))


@pytest.mark.parametrize("what", ["forward", "gradients", "step"])
@pytest.mark.parametrize("case", [TINY, STACK], ids=lambda case: case.name)
def test_every_way_is_measured_and_right(case, what):
    (found,) = measured(case, (what,))
    assert all(isinstance(one, Record) for one in found)
    ways = {record.way: record for record in found}
    assert {f"{who} {layout}" for who in ("operator", "torch") for layout in ("nchw", "nhwc")} <= ways.keys()
    assert all(0 < record.timing.p20_ms <= record.timing.p50_ms <= record.timing.p80_ms for record in found)
    assert all(record.excess <= 1 for record in found)
    assert {record.flops for record in found} == {{"forward": 1, "gradients": 2, "step": 3}[what] * case.flops}
    if what == "forward":
        assert set(runtimes.installed()) <= ways.keys()
    else:
        assert not {"onnxruntime", "openvino"} & ways.keys()


def test_every_backend_that_was_not_chosen_is_measured_by_force(registered):
    registered(replace(reference.BACKEND, name="new", automatic=True))
    (found,) = measured()
    backends = {record.way: record.backend for record in found}
    assert backends["operator nhwc"] == backends["operator nchw"] == "new"
    assert backends["aten nhwc"] == backends["aten nchw"] == "aten"
    assert "new nhwc" not in backends
    assert "reference nhwc" not in backends


def test_a_backend_that_refuses_the_case_is_not_measured(registered):
    registered(replace(reference.BACKEND, name="new", automatic=True, refusal=lambda call: "no"))
    assert not [record for record in measured()[0] if "new" in record.way]


@pytest.mark.parametrize("what", ["forward", "gradients", "step"])
def test_a_wrong_result_gets_no_time(registered, what):
    def forward(x, weight, bias, relu, algorithm):
        y = reference.forward(x, weight, bias, relu)
        y[0, -1, 0, 0] += 1e-2
        return y

    def backward(dy, x, weight, wanted, algorithm):
        dx, dw, db = reference.backward(dy, x, weight, wanted)
        dw[-1, 0, 0, 0] += 1e-2
        return dx, dw, db

    new = replace(reference.BACKEND, name="new", automatic=True, forward=forward, backward=backward)
    registered(new)
    (found,) = measured(whats=(what,))
    wrong = {one.way: one.excess for one in found if isinstance(one, ops.Wrong)}
    assert wrong.keys() == {"operator nhwc", "operator nchw"}
    assert min(wrong.values()) > 1
    assert "wrong by" in tables.rows(found)[1]
    assert "not timed" in tables.rows(found)[1]


def test_the_gate_finds_small_and_non_finite_errors_and_wrong_shapes():
    x, w, dy = torch.randn(TINY.shape), torch.randn(11, 1, 7, 7), torch.randn(TINY.shape)
    expected = truths(TINY, "forward", x, w, dy)
    right = reference.forward(x, w, None, False)
    assert excess(expected, [right]) < 0.5
    assert 1 < excess(expected, [right * (1 + 1e-4)]) < 1000
    assert excess(expected, [right.clone().index_fill_(1, torch.tensor([3]), math.nan)]) == math.inf
    assert excess(expected, [right[:, :, :-1]]) == math.inf
    dx, dw, _ = reference.backward(dy, x, w, [True, True, False])
    both = truths(TINY, "gradients", x, w, dy)
    assert excess(both, [dx, dw]) < 0.5
    assert excess(both, [dx, dw + 1e-2]) > 1


def test_a_large_case_is_checked_on_some_channels_with_the_first_and_the_last():
    case = Case("wide", (1, 900, 2, 2), 3)
    x, w = torch.randn(case.shape), torch.randn(900, 1, 3, 3)
    (truth,) = truths(case, "forward", x, w, x, share=1e-5)
    assert 2 <= len(truth.channels) < 900
    assert truth.channels[[0, -1]].tolist() == [0, 899]


def test_products_with_padding_are_not_useful():
    for h, w, k in ((1, 1, 1), (1, 1, 5), (7, 7, 13), (9, 4, 3)):
        case = Case("", (2, 3, h, w), k)
        ones = reference.forward(torch.ones(case.shape), torch.ones(3, 1, k, k), None, False)
        assert case.useful_flops == 2 * ones.sum().item()
        assert case.flops == 2 * ones.numel() * k * k
    assert STACK.flops == sum(case.flops for case in STACK.layers)


def test_the_suites_are_those_of_the_project():
    names = {name: [case.name for case in suite.cases] for name, suite in SUITES.items() if name != "tiny"}
    assert [len(names[name]) for name in ("layers", "table1", "grid", "training")] == [13, 60, 100, 8]
    assert len(SUITES["layers"].cases[-1].layers) == 24
    assert all(len(set(group)) == len(group) for group in names.values())
    assert all(case.kernel >= 7 and case.shape[1] >= 32 for case in SUITES["grid"].cases)


def test_the_grid_is_the_same_every_time_and_spread_out():
    cases = grid()
    assert cases == grid()
    assert cases[0].name == "grid.n16.c192.20x10.k7"
    for axis, least in enumerate((6, 12, 12, 12)):
        assert len({case.shape[axis] for case in cases}) >= least
    assert {case.kernel for case in cases} == {7, 9, 11, 13, 15, 17, 21, 25, 27, 29, 31, 51}
    assert max(case.flops for case in cases) <= 2e9


def test_cases_are_chosen_by_suite_and_pattern():
    assert [name for name, _, _ in chosen(None, [])] == ["layers"]
    ((name, _, cases),) = chosen("table1", ["table1.n1.r16.k?", "*.k31"])
    assert name == "table1"
    assert len(cases) == 4 + 6
    # training has the layers' cases again
    assert [name for name, _, _ in chosen(None, ["31b.stage1", "small.*"])] == ["layers", "small"]
    with pytest.raises(ValueError, match=r"no case is called 31b\.stage9 in the suite layers; --list shows"):
        list(chosen("layers", ["31b.stage9"]))


def test_a_record_says_where_and_when_and_what_else_ran(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLKNET_ISA", "avx2")
    (found,) = measured()
    path = tmp_path / "new" / "r.jsonl"
    append(path, found[:1])
    append(path, found[1:])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [json.loads(json.dumps(asdict(record))) for record in found]
    first = lines[0]
    assert (first["suite"], first["case"], first["shape"], first["kernel"]) == ("tiny", "tiny", [2, 11, 6, 5], 7)
    assert first["environment"]["REPLKNET_ISA"] == "avx2"
    assert first["versions"]["torch"] == torch.__version__
    assert first["threads"] == torch.get_num_threads()
    assert first["load"].keys() == {"load_before", "load_after", "others"}
    assert all(first[name] for name in ("commit", "device", "date"))


def record(way, ms, **changes):
    values = {"suite": "table1", "case": "table1.n1.r16.k31", "shape": (1, 384, 16, 16), "kernel": 31}
    values |= {"what": "forward", "backend": way.split()[0], "timing": Timing(ms, ms, ms, 3)}
    return Record(**(values | {"way": way} | changes))


def test_rows_have_ratios_targets_and_the_share_of_the_peak():
    common = {"suite": "layers", "case": "31b.layers", "useful_flops": 10**9, "peak_gflops": 200.0}
    found = [record("operator nhwc", 10.0, **common), record("torch nhwc", 190.0, **common)]
    found.append(record("torch nchw", 1900.0, **common))
    lines = tables.rows(found)
    assert lines[0] == "31b.layers forward"
    numbers, verdicts = lines[1].split("  18x")
    assert numbers.split()[4:] == ["10.000..10.000", "19.00", "190.00", "19.00", "100.0", "50%"]
    assert verdicts == " torch nhwc: met; 200x torch nchw: missed"
    assert "met" not in lines[2]
    (alone,) = tables.rows(found[:1])[1:]
    assert "18x torch nhwc: not measured" in alone


def test_table1_compares_the_largest_kernel_with_torchs_smallest():
    small = {"case": "table1.n1.r16.k3", "kernel": 3}
    found = [record("torch nhwc", 2.0, **small), record("torch nchw", 3.0, **small), record("operator nhwc", 2.5)]
    found += [record("operator nchw", 2.6), record("operator nhwc", 1.0, **small)]
    expected = ["31x31 of the operator takes 1.25 times torch's 3x3 at N=1, R=16; at most 1.5: met"]
    assert tables.large_against_small(found) == expected
    assert tables.large_against_small(found[:2]) == []
    assert tables.curves(found)["forward, 1x384x16x16"]["torch nhwc"] == [(3, 2.0, 2.0, 2.0)]


def test_the_grid_names_the_worst_cases_first():
    found = [record(way, ms, suite="grid", case="a") for way, ms in (("operator nhwc", 1.04), ("torch nhwc", 1.0))]
    found += [record(way, ms, suite="grid", case="b") for way, ms in (("operator nhwc", 3.0), ("torch nchw", 1.5))]
    lines = tables.worst_of_grid(found)
    assert "more than 5 %: 1 of 2" in lines[0]
    assert lines[1] == "   2.00x its time  b forward, operator nhwc (operator)"
    assert tables.worst_of_grid([]) == []


def test_a_disturbed_measurement_is_named():
    assert tables.disturbance([record("torch nhwc", 1.0, load={"others": 0.05})]) == []
    assert "up to 1.5 processors busy" in tables.disturbance([record("torch nhwc", 1.0, load={"others": 1.5})])[0]
    assert tables.disturbance([]) == []


def test_overhead_is_the_difference_to_torch_in_the_same_layout():
    found = list(overhead.measure(["overhead.k3"], runs=2))
    assert [one.what for group in found for one in group[:1]] == ["forward", "forward, recorded"]
    assert {one.way for one in found[0]} == {f"{who} {x}" for who in ("operator", "torch") for x in ("nchw", "nhwc")}
    values = {"suite": "overhead", "case": "overhead.k3"}
    lines = tables.overhead_rows([record("operator nhwc", 0.03, **values), record("torch nhwc", 0.01, **values)])
    assert lines[0].split()[-5:] == ["30.0", "20.0", "under", "15:", "missed"]
    assert lines[1].split()[-1] == "10.0"


def test_the_hosts_time_of_a_gpu_call_is_told_without_a_gpu():
    found = list(overhead.measure([overhead.GPU], runs=2))
    assert [group[0].what for group in found] == ["forward", "step", "autocast step"]
    assert {one.way for one in found[2]} == {f"{who} {x}" for who in ("host", "casts") for x in ("nchw", "nhwc")}
    values = {"suite": "overhead", "case": overhead.GPU, "what": "autocast step"}
    lines = tables.overhead_rows([record("host nhwc", 0.11, **values), record("casts nhwc", 0.04, **values)])
    assert lines[0].split()[-5:] == ["110.0", "70.0", "under", "60:", "missed"]
    # afterwards all is as it was
    assert kernels.BACKENDS == BACKENDS
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(depthwise_conv2d(x, weight), conv2d(x, weight, padding=1, groups=2))


@pytest.mark.parametrize(
    "network",
    [
        Network("convnext", "test_convnext", 2, 32, "forward", "torch"),
        Network("convnext.step", "test_convnext", 2, 32, "training step", "torch"),
        Network("replknet.step", "replknet_test", 2, 32, "training step", "aten"),
    ],
    ids=lambda network: network.name,
)
def test_networks_before_and_after(network):
    (found,) = networks.measure([network], runs=2, limit_s=1.0)
    assert [one.way for one in found] == ["before nhwc", "after nhwc", "before nchw", "after nchw"]
    assert {one.what for one in found} == {network.what}
    lines = tables.network_rows(found)
    assert lines[0].split()[-1] == "1.00"
    assert float(lines[1].split()[-1]) > 0


def test_a_network_that_gives_other_logits_is_not_timed(monkeypatch):
    def broken(model):
        torch.nn.init.normal_(next(model.parameters()))

    monkeypatch.setattr(networks, "accelerate", broken)
    network = Network("convnext", "test_convnext", 2, 32, "forward", "torch")
    (found,) = networks.measure([network], runs=2, limit_s=1.0)
    assert [one.way for one in found if isinstance(one, ops.Wrong)] == ["after nhwc", "after nchw"]
    assert "wrong by" in tables.network_rows(found)[0]


def test_a_runtime_that_is_missing_is_not_measured_and_named(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert runtimes.missing() == ["onnxruntime", "openvino"]
    assert runtimes.installed() == {}
    text = "\n".join(tables.explanation(record("torch nhwc", 1.0, peak_gflops=1.0)))
    assert 'not installed: onnxruntime, openvino; `pip install ".[export]"` in a clone of replknet adds them' in text


def test_the_peak_is_measured():
    assert records.peak_gflops() > 0
