"""The checks on a GPU, where there is none: what is asked for, run and written."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from replknet.bench import gpu, gpu_layers, gpu_networks, gpu_tiles
from replknet.bench.cases import Case
from replknet.bench.records import Record
from replknet.timing import quantiles_of


def measured():
    timers = gpu_layers.Timers(*[lambda call: quantiles_of([1.0, 2.0, 3.0])] * 3)
    return list(gpu_layers.measure(Case("tiny", (2, 9, 6, 5), 7), torch.float32, "cpu", timers))


def names(*options, parts=gpu.PARTS):
    """Of the jobs that options ask for."""
    args = gpu._parser().parse_args(options)
    jobs = gpu.jobs(args.part, args.only, args.dtype, args.images, args.torch_limit_ms)
    return [job.name for job in jobs if job.part in parts]


def test_without_a_cuda_device_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no CUDA device: nothing was checked\n"


@pytest.fixture
def _device(monkeypatch):
    """As if there was a device, for a program that measures nothing on it; what the program sets is restored."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("REPLKNET_AUTOTUNE", "1")
    monkeypatch.setattr(
        gpu, "ProcessPoolExecutor", lambda workers, mp_context, initializer: ThreadPoolExecutor(workers)
    )
    for module in (gpu_layers, gpu_tiles):
        monkeypatch.setattr(module, "compile_case", lambda *args: None)
    monkeypatch.setattr(gpu_networks, "compile_network", lambda *args: None)
    yield
    setting.fp32_precision = before


@pytest.mark.usefixtures("_device")
def test_the_program_measures_writes_and_sums_up(monkeypatch, tmp_path, capsys):
    layers = measured()
    wrong = gpu_layers.Wrong("new", 0.5)
    asked = []

    def measure(theme):
        def run(*args):
            asked.append(theme)
            return iter(layers if theme != "tiles" else [layers[0], wrong])

        return run

    for module, theme in ((gpu_layers, "layers"), (gpu_networks, "networks"), (gpu_tiles, "tiles")):
        monkeypatch.setattr(module, "measure", measure(theme))
    # a result that is wrong makes it fail
    assert gpu.main(["--folder", str(tmp_path)]) == 1
    n = len(gpu_layers.FIRST) + 2 * len(gpu_layers.IN_EVERY_DTYPE)
    assert asked == [*["layers"] * n, *["networks"] * 3, *["tiles"] * 11]
    lines = {path.name.split("_")[0]: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert lines == {"layers": n * len(layers), "networks": 3 * len(layers), "tiles": 11}
    assert all(path.name.split("_")[1] == "h200" for path in tmp_path.iterdir())
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("NVIDIA H200, torch ")
    assert "WRONG: new by 5.0e-01" in out
    assert gpu.main(["--folder", str(tmp_path), "--limit", "0"]) == 0
    assert "left out after 0 s: 31b.56.n1 bfloat16, " in capsys.readouterr().out


@pytest.mark.usefixtures("_device")
def test_what_fails_is_named_and_does_not_stop_the_rest(monkeypatch, tmp_path, capsys):
    def compile_case(case, dtype):
        if case.name == "31b.28.n1":
            raise TypeError("no such tile")
        if case.name == "31b.56.n1":
            raise RuntimeError("the device of this process is lost")

    def measure(case, *args):
        if case.name == "31b.14.n1":
            raise torch.OutOfMemoryError("too large")
        return iter([replace(record, case=case.name)])

    record = next(one for one in measured() if isinstance(one, Record))
    monkeypatch.setattr(gpu_layers, "compile_case", compile_case)
    monkeypatch.setattr(gpu_layers, "measure", measure)
    options = ["--part", "layers", "--dtype", "bfloat16", "--only", "31b.*.n1", "--folder"]
    assert gpu.main([*options, str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAILED: 31b.28.n1 bfloat16: TypeError: no such tile\nFAILED: 31b.14.n1 bfloat16: too large" in said.out
    assert said.err.count("Traceback") == 3
    (file,) = tmp_path.iterdir()
    assert [name for name in ("31b.56.n1", "31b.28.n1", "31b.14.n1", "31b.7.n1") if name in file.read_text()] == [
        "31b.56.n1",
        "31b.7.n1",
    ]


@pytest.mark.usefixtures("_device")
def test_no_more_is_compiled_than_is_measured(monkeypatch, tmp_path):
    compiled, measured = [], []
    monkeypatch.setattr(gpu_layers, "compile_case", lambda case, dtype: compiled.append((case, dtype)))
    monkeypatch.setattr(gpu_layers, "measure", lambda case, dtype, *rest: measured.append((case, dtype)) or iter([]))
    options = ["--part", "layers", "--only", "table1.r16.*", "--dtype", "float16", "--folder"]
    assert gpu.main([*options, str(tmp_path)]) == 0
    assert set(compiled) == set(measured)
    assert len(compiled) == len(measured) == 7


def test_what_is_compiled_can_be_sent_to_another_process():
    for job in gpu.jobs(gpu.PARTS, ["*"], None, (64, 32), 20.0):
        assert len(pickle.loads(pickle.dumps(job.compile))) == {"replknet_31b": 2}.get(job.name, job.part != "networks")


def test_the_most_telling_cases_come_first():
    layers = names(parts=("layers",))
    for n, here in ((1, layers[:4]), (32, layers[4:8]), (64, layers[8:12])):
        assert here == [f"31b.{h}.n{n} bfloat16" for h in (56, 28, 14, 7)]
    assert layers[-6:] == [
        f"{case} {dtype}" for dtype in ("float32", "float16") for case in ("31b.56.n64", "31b.14.n64", "table1.r32.k31")
    ]
    kernels = {name.split(".k")[1] for name in layers[12:-6]}
    assert kernels == {f"{k} bfloat16" for k in (3, 5, 7, 13, 21, 31)}
    assert names()[len(layers)] == "replknet_31b"
    assert names()[-1] == "tiles of convnext.56.n64"


def test_cases_are_chosen_by_name_also_those_that_are_left_out_else():
    assert names("--only", "convnext*56*", "swin*") == [
        "convnext.56.n64 bfloat16",
        "swin_base_patch4_window7_224",
        "tiles of convnext.56.n64",
    ]
    assert names("--only", "31b.7.n1", "--only", "31b.7.n32") == [
        "31b.7.n1 bfloat16",
        "31b.7.n32 bfloat16",
        "tiles of 31b.7.n32",
    ]
    assert "31b.128.512px.n4 bfloat16" not in names()


def test_a_name_that_fits_nothing_shows_what_there_is(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--part", "networks", "--only", "replknet_*", "31b.*"])
    expected = (
        "no case of networks is called 31b.*; there are replknet_31b, swin_base_patch4_window7_224, convnext_base\n"
    )
    assert capsys.readouterr().err.endswith(expected)


def test_dtypes_that_are_asked_for_are_those_of_every_layer():
    assert names("--only", "31b.28.n64", "--dtype", "float16", "float32", parts=("layers",)) == [
        "31b.28.n64 float32",
        "31b.28.n64 float16",
    ]
    assert names("--only", "31b.28.n64", parts=("layers",)) == ["31b.28.n64 bfloat16"]


def test_parts_run_alone():
    assert names("--part", "networks") == list(gpu_networks.NETWORKS)
    assert names("--part", "tiles", "networks") == names(parts=("networks", "tiles"))


def test_options_reach_the_choice_of_jobs(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "jobs", lambda *args: asked.append(args) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limit = ["--torch-limit-ms", "7.5"]
    gpu.main(["--part", "tiles", "--only", "31b.*", "x", "--dtype", "float16", "--images", "48", "8", *limit])
    gpu.main([])
    assert asked == [
        (["tiles"], ["31b.*", "x"], ["float16"], [48, 8], 7.5),
        (("layers", "networks", "tiles"), [], None, (64, 32), 20.0),
    ]


def test_the_batches_of_networks_are_those_that_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_networks, "measure", lambda *args: asked.append(args[:3]) or iter([]))
    monkeypatch.setattr(gpu_networks, "compile_network", lambda model, images: asked.append((model, images)))
    (job,) = gpu.jobs(("networks",), ["replknet_31b"], None, (48, 8), 20.0)
    for call in (job.measure, *job.compile):
        call()
    ways = ("default", "triton", "aten")
    assert asked == [("replknet_31b", ways, (48, 8)), ("replknet_31b", 48), ("replknet_31b", 8)]


def test_the_limit_for_torch_reaches_the_clock_of_torch_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_layers, "measure", lambda *args: asked.append(args[3]) or iter([]))
    (job,) = gpu.jobs(("layers",), ["31b.7.n1"], None, (1,), 7.5)
    job.measure()
    assert asked[0].torch.keywords == {"limit_ms": 7.5}
    assert asked[0].backend is gpu_layers.device_time


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "example: python -m replknet.bench.gpu --part" in " ".join(capsys.readouterr().out.split())


def test_records_are_named_by_device_and_day(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "nvidia-geforce-rtx-4090",
    }
    for name, short in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(gpu.time, "strftime", lambda _: "2026-11-24")
        assert gpu.file_name("layers") == f"layers_{short}_2026-11-24.jsonl"


def test_the_cases_are_named_once():
    for cases in (gpu_layers.CASES, gpu_tiles.CASES):
        assert len({case.name for case in cases}) == len(cases)
    assert {f"31b.{h}.n32" for h in (56, 28, 14, 7)} <= {case.name for case in gpu_tiles.CASES}
