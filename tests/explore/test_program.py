"""The paper as experiments: which there are, how they run and go on, what they claim, and the page."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from functools import partial

import pytest

from replknet.cli.main import main
from replknet.explore import program, report
from replknet.explore.experiment import (
    Arm,
    Claim,
    Column,
    Experiment,
    RecordError,
    Results,
    Run,
    Site,
    compared,
    half_width,
    spread,
)
from replknet.explore.training_arms import score_columns, trained
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.segmentation.recipes import camvid


def run_of(arm, seed, **figures):
    return Run(
        arm=arm, key="k", seed=seed, figures=figures, seconds=1.0, provenance={"device": "some CPU", "threads": 2}
    )


def results(**values):
    return Results(tuple(run_of(arm, seed, score=v) for arm, found in values.items() for seed, v in enumerate(found)))


def counting(calls, name, seed, folder, site):
    calls.append((name, seed))
    return {"score": seed + len(name) / 10}


def experiment(calls, needs=()):
    arms = tuple(
        Arm(
            name=name,
            configuration={"arm": name},
            run=partial(counting, calls, name),
            seconds=lambda site: 7.0,
            seeds=2,
            needs=needs if name == "bb" else (),
        )
        for name in ("a", "bb")
    )
    claim = compared("bb is better", "score", "bb", "a", 0.5, "Table 9")
    columns = (Column(figure="score", title="top-1, %", paper={"a": 71.76}),)
    return Experiment(
        name="one", title="One", question="Is it?", scale="Small.", arms=arms, columns=columns, claims=(claim,)
    )


@pytest.fixture
def one(monkeypatch):
    """The programme with a single experiment, and the calls of its arms."""
    calls = []
    monkeypatch.setattr(program, "EXPERIMENTS", {"one": lambda scale: experiment(calls)})
    return calls


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_experiment_asks_its_own_arms(scale):
    for name, build in program.EXPERIMENTS.items():
        found = build(scale)
        assert found.name == name
        names = [arm.name for arm in found.arms]
        assert len(set(names)) == len(names)
        for column in found.columns:
            assert set(column.paper) <= set(names), column.title
        assert all(claim.ours(Results(())) is None for claim in found.claims), "nothing was run"
        # nothing of the configuration is lost on the way to a record and back
        for arm in found.arms:
            assert json.loads(json.dumps(arm.configuration)) == arm.configuration


def test_full_scale_is_the_papers_recipes():
    def arms(name):
        return {arm.name: arm for arm in program.EXPERIMENTS[name]("full").arms}

    bare = arms("shortcut")["13x13, no shortcut"].configuration
    assert (bare["model"], bare["dataset"], bare["epochs"]) == ("mobilenetv2_lk", "folder", 100)
    assert (bare["kernels"], bare["network"]) == ([13] * 7, {"shortcut": False})
    last = arms("last_stage")["9x9 last"].configuration
    assert (last["kernels"], last["network"]) == ([3] * 6 + [9], {"width": 0.75})
    sizes, dense = arms("kernel_sizes"), arms("segmentation")
    assert {name: (arm.configuration["model"], arm.configuration["epochs"]) for name, arm in sizes.items()} == {
        "RepLKNet-3": ("replknet_b_k3", 120),
        "RepLKNet-7": ("replknet_b_k7", 120),
        "RepLKNet-13": ("replknet_b_k13", 120),
        "RepLKNet-25": ("replknet_b_k25", 120),
        "RepLKNet-31": ("replknet_31b", 120),
    }
    for name, arm in dense.items():
        assert arm.configuration["dataset"] == "ade20k"
        assert arm.configuration["model"] == sizes[name].configuration["model"]
        assert [need.key for need in arm.needs] == [sizes[name].key]


def test_alike_arms_of_two_experiments_are_one_run():
    arms = {name: {a.name: a.key for a in program.EXPERIMENTS[name]("small").arms} for name in ("shortcut", "reparam")}
    assert arms["shortcut"]["13x13"] == arms["reparam"]["13x13"]
    assert arms["shortcut"]["13x13"] != arms["shortcut"]["13x13, no shortcut"]
    # seven stages of 3x3 with 3x3 in the last
    assert arms["shortcut"]["3x3"] == program.EXPERIMENTS["last_stage"]("small").arms[0].key
    full = program.EXPERIMENTS["shortcut"]("full").arms[0].key
    assert full != arms["shortcut"]["3x3"]


def test_a_difference_is_told_from_the_spread():
    claim = compared("large is better", "score", "large", "small", 1.5, "Table 9")
    assert claim.paper == "+1.50 points (Table 9)"
    # means 0.62 and 0.52; each variance 1e-4, so the half-width is 4.30 * 0.01
    clear = claim.ours(results(large=[0.61, 0.63], small=[0.51, 0.53]))
    assert (clear.text, clear.verdict) == ("+10.00 ± 6.08 points", "agrees")
    assert half_width([0.61, 0.63], [0.51, 0.53]) == pytest.approx(4.30 * 2**0.5 * 0.01)
    assert claim.ours(results(large=[0.51, 0.53], small=[0.61, 0.63])).verdict == "does not agree"
    assert claim.ours(results(large=[0.61, 0.63], small=[0.60, 0.62])).verdict == "within the spread"
    # one seed has no spread: the direction alone, and it says so
    assert claim.ours(results(large=[0.6], small=[0.5])).text == "+10.00 points, one seed"
    assert claim.ours(results(large=[0.6])) is None
    assert spread([0.5], 100) == "50.00"
    assert spread([0.5, 0.7], 100) == "60.00 ± 14.14"


def test_runs_go_by_seed_and_are_done_once(one, tmp_path):
    site = Site(output=tmp_path)
    todo = program.chosen("small", [])
    assert [(t.arm.name, t.seed) for t in todo] == [("a", 0), ("bb", 0), ("a", 1), ("bb", 1)]
    assert program.estimates(todo, site) == [7.0] * 4
    said = []
    program.run(todo, site, said.append)
    assert one == [("a", 0), ("bb", 0), ("a", 1), ("bb", 1)]
    assert said[1] == "[2/4] one/bb, seed 0"
    program.run(program.chosen("small", []), site, said.append)
    assert len(one) == 4, "a second call has nothing to do"
    content = json.loads((tmp_path / "one.json").read_text())
    assert [run["figures"]["score"] for run in content["runs"]] == [0.1, 1.1, 0.2, 1.2]
    assert content["claims"][0]["ours"]["verdict"] == "within the spread"
    assert {"torch", "python", "replknet"} <= content["runs"][0]["provenance"]["versions"].keys()


def test_an_interrupted_run_is_done_again_and_the_others_are_kept(one, tmp_path, monkeypatch):
    site = Site(output=tmp_path)
    todo = program.chosen("small", [])

    def interrupted(seed, folder, site):
        (folder / "half").touch()
        raise KeyboardInterrupt

    broken = dataclasses.replace(todo[1].arm, run=interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.run([todo[0], dataclasses.replace(todo[1], arm=broken)], site)
    assert [t.arm.name for t in program.pending(todo[:2], site)] == ["bb"]
    program.run(todo[:2], site)
    assert one == [("a", 0), ("bb", 0)]
    assert (site.folder(broken, 0) / "half").exists(), "a training finds its state in the same folder"


def test_a_run_of_another_process_is_left_to_it(one, tmp_path):
    site = Site(output=tmp_path)
    todo = program.chosen("small", ["one/a"])
    folder = site.folder(todo[0].arm, 0)
    folder.mkdir(parents=True)
    said = []
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        program.run(todo, site, said.append)
    assert one == [("a", 1)]
    assert said[0].endswith("one/a, seed 0: another process has it")


def test_a_run_that_needs_another_says_which(tmp_path, monkeypatch):
    calls = []
    first = experiment(calls).arms[0]
    monkeypatch.setattr(program, "EXPERIMENTS", {"one": lambda scale: experiment(calls, needs=(first,))})
    site = Site(output=tmp_path)
    with pytest.raises(ValueError, match=r"one/bb, seed 0 needs the run of a with the same seed, which is not there"):
        program.run(program.chosen("small", ["one/bb"]), site)
    program.run(program.chosen("small", []), site)
    assert len(calls) == 4


def test_only_takes_patterns_of_experiments_and_arms():
    names = [(t.experiment.name, t.arm.name) for t in program.chosen("small", ["shortcut/13*", "family"], seeds=1)]
    assert names.count(("shortcut", "13x13")) == names.count(("family", "31-29-27-13")) == 1
    assert {name for name, _ in names} == {"shortcut", "family"}
    assert len(names) == 7
    with pytest.raises(ValueError, match=r"no experiment or arm is called 'shortcuts'; there are family, shortcut"):
        program.chosen("small", ["shortcuts"])


def test_missing_data_is_told_before_anything_runs(tmp_path, capsys):
    common = ["explore", "--output", str(tmp_path / "new")]
    assert main([*common, "--only", "family", "segmentation"]) == 2
    assert capsys.readouterr().err == (
        "replknet explore: segmentation needs images with masks: name their folder or zip with --masks, or name the "
        "others with --only\n"
    )
    assert main([*common, "--scale", "full", "--only", "shortcut"]) == 2
    assert "shortcut needs the folder of ImageNet: name it with --data" in capsys.readouterr().err
    assert main([*common, "--scale", "full", "--only", "conflict"]) == 2
    assert "conflict needs cue-conflict images" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_page_is_made_from_records_alone(one, tmp_path):
    site = Site(output=tmp_path / "runs")
    program.run(program.chosen("small", []), site)
    elsewhere = tmp_path / "docs"
    elsewhere.mkdir()
    (site.output / "one.json").rename(elsewhere / "one.json")
    page = report.write([experiment([])], elsewhere).read_text()
    assert "| a | 2 of 2 | 0.60 ± 0.71 | 71.76 |" in page
    assert (
        'Claims with a direction that were asked here: 1; "agrees" 0, "does not agree" 0, "within the spread" 1.'
        in page
    )
    assert "| bb is better | +0.50 points (Table 9) | +10.00 ± 304.06 points | **within the spread** |" in page
    other = experiment([])
    changed = dataclasses.replace(other, arms=(dataclasses.replace(other.arms[0], configuration={"arm": 2}),))
    with pytest.raises(ValueError, match=r"one.json has runs of a, bb with another configuration than now"):
        report.write([changed], elsewhere)


def test_a_claim_without_direction_has_no_verdict(one, tmp_path):
    program.run(program.chosen("small", []), Site(output=tmp_path))
    asked = dataclasses.replace(
        experiment([]), claims=(Claim(text="it is fast", paper="1.5 times", ours=lambda results: None),)
    )
    assert "| it is fast | 1.5 times | not run | - |" in report.write([asked], tmp_path).read_text()


def test_command_lists_estimates_runs_and_goes_on(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    common = ["explore", "--only", "shortcut/3x3", "kernel_sizes/RepLKNet-31", "fields/RepLKNet-31*", "--seeds", "1"]
    common += ["--data", str(cifar), "--output", str(tmp_path)]
    assert main([*common, "--list"]) == 0
    assert "      shortcut/3x3, seed 0\n" in capsys.readouterr().out
    assert main([*common, "--estimate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], told["left"]) == (4, 4)
    # steps are of 50,000 images
    assert told["seconds"] > 10
    assert main(common) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.md'}\n"
    page = (tmp_path / "report.md").read_text()
    for text in ("Guideline 2", "| 3x3 | 1 of 3 |", "| RepLKNet-31 | 1 of 3 |", "71.76", "not run"):
        assert text in page
    fields = json.loads((tmp_path / "fields.json").read_text())["runs"]
    assert [run["arm"] for run in fields] == ["RepLKNet-31", "RepLKNet-31, untrained"]
    assert len(fields[0]["figures"]["log_map"]) == 48
    assert (tmp_path / "fields.png").stat().st_size > 5000
    assert main([*common, "--list", "--json"]) == 0
    assert all(json.loads(line)["done"] for line in capsys.readouterr().out.splitlines())
    assert main(["explore", "--output", str(tmp_path / "new"), "--report"]) == 2
    assert "there is no record of an experiment in" in capsys.readouterr().err


@pytest.mark.full
def test_segmentation_starts_from_the_classifier_of_the_same_seed(cifar, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    # the arms of the experiments with a tiny network and few steps
    classifier = cifar10().changed(model="replknet_test", epochs=1, warmup_epochs=0, ema_decay=None)
    start = trained("classifier", classifier, images=240, seeds=1)
    recipe = camvid().changed(
        model="replknet_test",
        weights=None,
        crop=(32, 48),
        channels=16,
        auxiliary_channels=8,
        samples=24,
        warmup_samples=0,
        evaluate=False,
    )
    arm = trained("segmentation", recipe, images=12, seeds=1, start=start)
    assert arm.configuration["weights"] == f"of the run {start.key}"
    built = dataclasses.replace(experiment([]), arms=(start, arm), claims=(), columns=score_columns("score, %", {}))
    monkeypatch.setattr(program, "EXPERIMENTS", {"one": lambda scale: built})
    site = Site(output=tmp_path, images=cifar, masks=scenes)
    todo = program.chosen("small", [])
    assert all(seconds > 0 for seconds in program.estimates(todo, site))
    program.run(todo, site)
    first, second = json.loads((tmp_path / "one.json").read_text())["runs"]
    assert first["figures"]["parameters"] < second["figures"]["parameters"]
    assert 0 <= second["figures"]["score"] <= 1
    assert second["figures"]["iou"].keys() == {"grass", "sky", "sun"}
    # the state to go on from is large, and no longer needed
    assert not (site.folder(arm, 0) / "last.ckpt").exists()
    assert (site.folder(arm, 0) / "model.safetensors").exists()


@pytest.mark.full
def test_trainings_in_two_processes_are_kept_by_the_first(cifar, tmp_path):
    only = ["--only", "shortcut/3x3", "kernel_sizes/RepLKNet-3", "fields/RepLKNet-3", "--seeds", "1"]
    command = [sys.executable, "-m", "replknet.cli.main", "explore", *only, "--devices", "2", "--data", str(cifar)]
    # Lightning starts the second process with the same command
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        env=os.environ | {"CI": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'report.md'}\n"
    assert "MEMBER: 2/2" in result.stderr
    for name in ("shortcut", "kernel_sizes", "fields"):
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as a record of experiments: Expecting value"),
        ("[1]", "is not a record of experiments: expected an object for a run, got a list of 1"),
        ("{}", "a run must have arm, key, seed, figures, seconds, provenance; 'arm' is missing or unknown"),
        (
            '{"arm": "a", "key": "b", "seed": "x", "figures": {}, "seconds": 1, "provenance": {}}',
            "seed must be of type int, got 'x'",
        ),
    ],
)
def test_a_damaged_run_is_one_line_with_the_way_out(text, message, tmp_path):
    arm = Arm(name="an arm", configuration={"a": 1}, run=lambda *_: {}, seconds=lambda site: 1.0)
    site = Site(output=tmp_path)
    path = site.folder(arm, 0) / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RecordError) as error:
        program.read(site, arm, 0)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("; move it away, and run the experiment again")
