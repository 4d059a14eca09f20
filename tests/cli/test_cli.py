"""The commands as a person types them, on a small stand-in for CIFAR-10; errors are one line and code 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image

import replknet
from replknet.cli.main import COMMANDS, main
from replknet.data.images import PHOTOS
from replknet.models import NETWORKS, load_model
from replknet.train.checkpoint import StateError
from replknet.train.guard import LossError


@pytest.fixture(autouse=True)
def _ci(monkeypatch):
    monkeypatch.setenv("CI", "true")


SHORT = ["--model", "replknet_test", "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "40", "--workers", "0"]


@pytest.fixture(scope="session")
def trained(cifar, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", "cifar10", "--data", str(cifar), "--output", str(output), *SHORT]) == 0
    return output


def test_training_leaves_weights_state_recipe_and_metrics(trained, capsys):
    assert {"model.safetensors", "last.ckpt", "recipe.json", "metrics.json"} <= {p.name for p in trained.iterdir()}
    model, description = load_model(trained / "model.safetensors")
    assert description.classes[3] == "cat"
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
    assert checkpoint["replknet_recipe"]["epochs"] == 2
    assert checkpoint["global_step"] == 12
    curve = json.loads((trained / "metrics.json").read_text())
    assert [row["epoch"] for row in curve] == [0, 1]
    assert all({"train_loss", "val_loss", "val_top1"} <= row.keys() for row in curve)


def test_a_result_is_not_overwritten_and_another_recipe_does_not_resume(trained, cifar, capsys):
    command = ["train", "cifar10", "--data", str(cifar), "--output", str(trained), *SHORT]
    assert main(command) == 2
    assert "last.ckpt has the state of an earlier training: --resume goes on" in capsys.readouterr().err
    assert main([*command, "--lr", "0.5", "--resume"]) == 2
    assert "is of another recipe (lr was 0.01, now 0.5)" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0


def test_resume_without_a_state(cifar, tmp_path, capsys):
    assert main(["train", "cifar10", "--data", str(cifar), "--output", str(tmp_path), "--resume"]) == 2
    assert f"nothing to resume: there is no {tmp_path}/last.ckpt" in capsys.readouterr().err


def test_ctrl_c_from_a_terminal_keeps_the_state(cifar, tmp_path):
    # a shell may have started this test with the signal ignored, which a child would inherit
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from replknet.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", "cifar10", "--data", str(cifar)]
    command += ["--output", str(tmp_path / "out"), *SHORT, "--epochs", "300", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(1200):
        if (tmp_path / "out" / "last.ckpt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    # a terminal sends it to the worker that loads images as well
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Go on with: replknet train cifar10" in errors
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert 0 < state["global_step"] < 1800
    assert load_model(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_training_says_how_to_go_on(kept, tmp_path, capsys, monkeypatch):
    def interrupted(recipe, folder, data, resume, hardware):
        if kept:
            (folder / "last.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("replknet.tasks.training.fit", interrupted)
    output = tmp_path / "my runs"
    output.mkdir()
    assert main(["train", "cifar10", "--kernels", "[9, 7, 5, 5]", "--output", str(output)]) == 130
    command = f"replknet train cifar10 --kernels '[9, 7, 5, 5]' --output '{output}'"
    if kept:
        text = f"interrupted; the state is in {output}/last.ckpt. Go on with: {command} --resume\n"
    else:
        text = f"interrupted before there was a state to keep. Start again with: {command}\n"
    assert capsys.readouterr().err == "\n" + text


@pytest.mark.parametrize("error", [StateError, LossError])
def test_a_training_that_fails_says_why_in_a_line(error, capsys, monkeypatch):
    def failing(recipe, folder, data, resume, hardware):
        assert (hardware.devices, hardware.device_batch, hardware.save_steps) == (2, 16, None)
        raise error("the reason")

    monkeypatch.setattr("replknet.tasks.training.fit", failing)
    assert main(["train", "cifar10", "--devices", "2", "--device-batch", "16"]) == 1
    assert capsys.readouterr().err == "replknet train: the reason\n"


def test_other_commands_just_stop(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("replknet.cli.doctor.main", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nreplknet doctor: interrupted\n"


def test_eval(trained, cifar, capsys):
    checkpoint = str(trained / "model.safetensors")
    assert main(["eval", checkpoint, "--data", str(cifar), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 60
    assert sum(map(sum, scores["confusion"])) == 60
    assert scores["top1"] == pytest.approx(sum(scores["confusion"][i][i] for i in range(10)) / 60)
    assert main(["eval", checkpoint, "--data", str(cifar)]) == 0
    assert "60 images  top-1" in capsys.readouterr().out


def test_predict(trained, capsys, tmp_path):
    checkpoint = str(trained / "model.safetensors")
    assert main(["predict", checkpoint, *map(str, PHOTOS), "--top", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, PHOTOS))
    assert all(len(line["top"]) == 2 for line in lines)
    assert lines[0]["top"][0]["probability"] >= lines[0]["top"][1]["probability"]
    assert main(["predict", checkpoint, str(tmp_path)]) == 2
    assert "no images in" in capsys.readouterr().err


def test_merge_verifies_on_random_and_real_images(trained, capsys, tmp_path):
    checkpoint, output = str(trained / "model.safetensors"), tmp_path / "m.safetensors"
    assert main(["merge", checkpoint, str(output), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["norms_left"] == ["norm"]
    assert result["parameters_after"] < result["parameters_before"]
    assert {name: d["inputs"] for name, d in result["differences"].items()} == {"random": 2, "images": 2}
    assert all(d["relative_l2"] <= result["bound"] == 2e-5 for d in result["differences"].values())
    assert main(["merge", checkpoint, str(output), "--branches-only"]) == 0
    assert "norms left: stem.0.bn, stem.1.bn, stem.2.bn, stem.3.bn, ... (41 in all)" in capsys.readouterr().out
    assert main(["merge", checkpoint, str(tmp_path / "m.pth")]) == 2
    assert "the result is a .safetensors file, got" in capsys.readouterr().err


def test_merge_verifies_other_channels_on_random_images_alone(tmp_path, capsys):
    model = timm.create_model("replknet_test", in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / "gray.pth")
    assert main(["merge", str(tmp_path / "gray.pth"), str(tmp_path / "m.safetensors"), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "largest difference on 2 random inputs" in text
    assert "real images" not in text


def test_merge_fails_above_the_bound(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("replknet.cli.merge.BOUND", 0.0)
    assert main(["merge", str(trained / "model.safetensors"), str(tmp_path / "m.safetensors"), "--verify"]) == 1
    assert "more than the bound" in capsys.readouterr().err


def test_export_says_how_far_the_file_is_from_torch(capsys, tmp_path):
    checkpoint, output = "replknet_cifar_l", tmp_path / "out" / "net.pt2"
    command = ["export", checkpoint, "--to", "pt2", "-o", str(output), "--images", str(PHOTOS[0])]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{output}: the logits of 3 images and of noise in two other sizes differ by at most ")
    assert " of their norm (1e-05 is allowed)\n" in told
    assert told.endswith(f"asks for trust: replknet predict {output} IMAGE --trust\n")
    assert main(["predict", str(output), str(PHOTOS[0]), "--trust", "--task", "segmentation"]) == 2
    assert "holds a classifier, not a segmentation network" in capsys.readouterr().err
    assert main(["export", checkpoint, "--to", "pt2", "--task", "segmentation", "-o", str(output)]) == 2
    assert "holds a classifier, not a segmentation network" in capsys.readouterr().err
    assert main([*command, "--task", "detecton"]) == 2
    assert "--task takes one of classification, segmentation, detection, got detecton; did you mean detection?" in (
        capsys.readouterr().err
    )


def test_erf(trained, capsys, tmp_path):
    picture = tmp_path / "erf.png"
    command = ["analyze", "erf", str(trained / "model.safetensors"), "--size", "64", "-o", str(picture)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["images"], found["size"], found["scale"]) == (str(picture), 2, 64, "log")
    (network,) = found["networks"]
    assert (network["label"], network["trained"], network["images"], network["skipped"]) == (
        "replknet_test",
        True,
        2,
        0,
    )
    assert network["areas"]["0.5"] == (network["sides"]["0.5"] / 64) ** 2
    assert (network["curve"]["areas"][-1], network["curve"]["shares"][-1]) == (1, 1)
    assert Image.open(picture).format == "PNG"
    assert main([*command, "--scale", "linear"]) == 0
    head, row, path = capsys.readouterr().out.splitlines()
    assert head.split() == ["network", "params", "M", "20", "%", "30", "%", "50", "%", "99", "%"]
    assert row.split()[0] == "replknet_test"
    assert path == str(picture)


def test_erf_says_which_networks_are_untrained(trained, capsys, tmp_path):
    checkpoint, other = str(trained / "model.safetensors"), str(tmp_path / "other.safetensors")
    options = ["--size", "64", "--count", "1", "-o", str(tmp_path / "erf.png")]
    networks = [checkpoint, "test_vit.r160_in1k", "replknet_cifar", "test_vit.r160_in1k"]
    assert main(["analyze", "erf", *networks, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 1
    assert [(n["label"], n["name"], n["trained"]) for n in found["networks"]] == [
        ("replknet_test", "replknet_test", True),
        # built for 64 pixels, not for its own 160
        ("test_vit.r160_in1k, untrained", "test_vit.r160_in1k", False),
        ("replknet_cifar, untrained", "replknet_cifar", False),
    ]
    # before merging, which takes branches and norms away
    count = sum(p.numel() for p in timm.create_model("replknet_cifar").parameters())
    assert found["networks"][2]["parameters"] == count
    shutil.copy(checkpoint, other)
    assert main(["analyze", "erf", checkpoint, other, "replknet_test", "--untrained", *options]) == 0
    rows = capsys.readouterr().out.splitlines()[1:-1]
    labels = [checkpoint, f"{checkpoint}, untrained", other, f"{other}, untrained", "replknet_test, untrained"]
    assert [row.startswith(label) for row, label in zip(rows, labels, strict=True)] == [True] * 5
    # the same random weights, whatever came before
    assert rows[1].split("untrained")[1].split() == rows[3].split("untrained")[1].split()


def test_erf_with_pretrained_weights_or_the_reason_why_not(capsys, tmp_path, monkeypatch):
    command = ["analyze", "erf", "--size", "32", "--pretrained", "-o", str(tmp_path / "erf.png")]
    assert main([*command, "replknet_test"]) == 2
    error = capsys.readouterr().err
    assert (
        "timm cannot build replknet_test with its trained weights for 32x32 images: no weights were released for"
        in error
    )
    assert "; try it without --pretrained" in error
    create, asked = timm.create_model, []

    def without_server(*args, pretrained, **kwargs):
        asked.append(pretrained)
        if len(asked) == 1:
            raise OSError("no route to host")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", without_server)
    assert main([*command, "test_resnet"]) == 2
    assert "for 32x32 images: no route to host; try it without --pretrained" in capsys.readouterr().err
    assert main([*command, "test_resnet", "--untrained", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [n["label"] for n in found["networks"]] == ["test_resnet", "test_resnet, untrained"]
    assert asked == [True, True, False]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("replknet_31bb", "and no model of timm's; did you mean replknet_31b, replknet_31l, replknet_b_k7?"),
        ("replknet_31b.in2k", "and no model of timm's; did you mean replknet_31b.in22k, replknet_31b.in1k, "),
        (
            "???",
            "??? is no checkpoint file, none of the weights that come with replknet (replknet_cifar_l.cifar10) and",
        ),
        (
            "test_vit",
            "test_vit, untrained does not run on images of 8x8: Input height (8) should be divisible by patch",
        ),
    ],
)
def test_erf_errors_are_one_line(network, message, capsys, tmp_path):
    assert main(["analyze", "erf", network, "--size", "8", "-o", str(tmp_path / "erf.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_training_on_a_folder_and_its_errors(tmp_path, capsys):
    for split in ("train", "val"):
        for label, colour in (("dark", 30), ("light", 220)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 36), (colour, colour + i, colour)).save(tmp_path / split / label / f"{i}.png")
    command = ["train", "folder", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    short = ["--model", "replknet_test", "--image-size", "32", "--epochs", "1", "--warmup-epochs", "0"]
    short += ["--batch-size", "4", "--workers", "0", "--mixup", "0.2", "--clip-grad", "1.0", "--layer-decay", "0.8"]
    assert main([*command, *short]) == 0
    checkpoint = str(tmp_path / "out" / "model.safetensors")
    assert load_model(checkpoint)[1].classes == ("dark", "light")
    assert main(["eval", checkpoint, "--dataset", "folder", "--data", str(tmp_path), "--json"]) == 0
    capsys.readouterr()
    assert main(["eval", checkpoint, "--dataset", "folder"]) == 2
    assert "name the folder of the images with --data DIR" in capsys.readouterr().err
    assert main(["train", "folder", "--output", str(tmp_path / "new"), *short]) == 2
    assert "trains on your images: name their folder with --data DIR" in capsys.readouterr().err
    (tmp_path / "train" / "dark" / "1.png").write_text("no image")
    again = ["train", "folder", "--data", str(tmp_path), *short]
    assert main([*again, "--output", str(tmp_path / "skipping")]) == 0
    assert "dark/1.png cannot be read as an image" in capsys.readouterr().err
    strict = ["--output", str(tmp_path / "strict"), "--unreadable-images", "0", "--workers", "1"]
    assert main([*again, *strict]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("replknet train: ")
    assert told.endswith("that is image 1 that cannot be read, and 0 may be skipped (--unreadable-images)")
    (tmp_path / "val" / "dark" / "3.png").write_text("no image")
    scoring = ["eval", checkpoint, "--dataset", "folder", "--data", str(tmp_path)]
    assert main(scoring) == 2
    assert "and 0 may be skipped (--unreadable-images)" in capsys.readouterr().err
    assert main([*scoring, "--unreadable-images", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7
    (tmp_path / "val" / "extra").mkdir()
    (tmp_path / "val" / "dark" / "0.png").rename(tmp_path / "val" / "extra" / "0.png")
    assert main(["train", "folder", "--data", str(tmp_path), "--output", str(tmp_path / "new"), *short]) == 2
    assert "must have the same classes in the same order; only one of them has extra" in capsys.readouterr().err


def test_configuration_is_printed_and_read_back(tmp_path, capsys):
    assert main(["train", "cifar10", "--lr", "0.003", "--kernels", "[9, 7, 5, 5]", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["lr"] == 0.003
    file = tmp_path / "c.json"
    file.write_text(text)
    assert main(["train", "cifar10", "--config", str(file), "--epochs", "9", "--print-config"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {**json.loads(text), "epochs": 9}
    assert main(["train", "--config", str(tmp_path / "missing.json"), "cifar10"]) == 2
    assert "missing.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"learning_rate": 3}', "c.json has learning_rate, which this recipe lacks; there are model, weights"),
        ("lr: 3", "c.json cannot be read as JSON as --print-config writes it: Expecting value"),
        ("[1, 2]", "c.json must hold one JSON object, as --print-config writes it, got a list of 2"),
        ('{"lr": -1}', "lr must be positive, got -1"),
    ],
)
def test_configuration_file_errors_are_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "c.json"
    file.write_text(content)
    assert main(["train", "cifar10", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("key", "value"), [("epochs", "many"), ("precision", "8-bit"), ("kernels", 3)])
def test_values_of_a_configuration_file_are_checked_like_options(key, value, tmp_path, capsys):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({key: value}))
    assert main(["train", "cifar10", "--config", str(file), "--print-config"]) == 2
    assert f"replknet train: --{key} takes a" in capsys.readouterr().err.replace("one of", "a")


def test_the_recipe_is_the_one_named_wherever_it_stands(capsys):
    assert main(["train", "--lr", "0.003", "folder", "--print-config"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["lr"]) == ("replknet_nano", 0.003)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs must be positive, got 0"),
        (["--drop-path", "1"], "drop_path must be at least 0 and below 1, got 1"),
        (["--ema-decay", "2"], "ema_decay must be between 0 and 1, got 2.0; null for no average"),
        (["--warmup-epochs", "50"], "warmup_epochs must be below the 5 epochs, got 50"),
        (
            ["--model", "resnet18", "--output", "OUT", "--data", "DATA"],
            "model must be one of replknet's, got 'resnet18'",
        ),
    ],
)
def test_recipe_errors_are_one_line(options, message, capsys, tmp_path, cifar):
    options = [{"OUT": str(tmp_path), "DATA": str(cifar)}.get(word, word) for word in options]
    assert main(["train", "cifar10", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_words_get_their_nearest_match(capsys):
    assert main(["tran"]) == 2
    assert "no command is called 'tran'; did you mean train?" in capsys.readouterr().err
    assert main(["train", "cifar"]) == 2
    assert "no recipe is called 'cifar'; did you mean cifar10?" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert "no command is called 'fly'; there are demo, info, explore, train" in capsys.readouterr().err
    assert main(["train", "objects"]) == 2
    assert "no recipe is called 'objects'; there are cifar10, cifar10_l, folder" in capsys.readouterr().err
    assert main(["train", "cifar10", "--epoch", "3"]) == 2
    assert "did you mean --epochs?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as info:
        main([command, "--help"])
    assert info.value.code == 0
    assert f"example: replknet {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "info",
        "eval",
        "predict",
        "merge",
        "export",
        "analyze erf",
        "analyze kernels",
        "analyze shape-bias",
        "bench",
        "doctor",
        "explore",
        "train",
    ],
)
def test_results_can_be_had_as_json(command, capsys):
    # demo prints the path of its report
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "--json" in capsys.readouterr().out


def test_overview_and_version(capsys):
    assert main(["--help"]) == 0
    assert "receptive field" in capsys.readouterr().out
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{replknet.__version__}\n"


def test_info_and_doctor(capsys):
    assert main(["info", "--json"]) == 0
    text = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(text)}
    assert rows.keys() == NETWORKS.keys()
    assert rows["replknet_31b"]["parameters"] == 79_864_168
    assert rows["replknet_31b"]["multiply_adds_merged"] == pytest.approx(15.354e9, rel=1e-4)
    assert len(rows["replknet_31b"]["pretrained"]) == 4
    assert main(["info"]) == 0
    assert "replknet_xl" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert {check["backend"] for check in json.loads(capsys.readouterr().out)["checks"]} == {"native"}


def test_a_reader_that_stops_early_sees_no_traceback():
    command = [
        sys.executable,
        "-c",
        "import sys; from replknet.cli.main import main; sys.exit(main(['train', '--list']))",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_a_missing_file_is_one_line(capsys):
    assert main(["eval", "nowhere.pth"]) == 2
    assert capsys.readouterr().err == (
        "replknet eval: no checkpoint at nowhere.pth; weights that come with replknet: replknet_cifar_l.cifar10\n"
    )


def test_official_weights_merge_from_the_command_line(tmp_path, capsys):
    model = timm.create_model("replknet_31b", depths=(1, 1, 1, 1), channels=(8, 16, 24, 32)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    assert main(["merge", str(tmp_path / "official.pth"), str(tmp_path / "m.safetensors"), "--verify"]) == 0
    assert "largest difference on 2 real images" in capsys.readouterr().out
    _, description = load_model(tmp_path / "m.safetensors")
    assert description.config.kernels == (31, 29, 27, 13)
    assert main(["merge", str(tmp_path / "m.safetensors"), str(tmp_path / "again.safetensors"), "--verify"]) == 0


def test_an_optional_package_that_is_missing_names_its_extra(monkeypatch, capsys, trained):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "replknet.analysis.plots", raising=False)
    assert main(["analyze", "erf", str(trained / "model.safetensors"), "--size", "32"]) == 2
    assert '`pip install ".[viz]"` in a clone of replknet adds it' in capsys.readouterr().err
