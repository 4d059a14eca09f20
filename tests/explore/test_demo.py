"""The main job on a stand-in data set: the report has every part, and a second call goes on from the first."""

import re

import pytest

from replknet.cli.main import main


@pytest.mark.full
def test_demo_writes_a_self_contained_report(cifar, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    command = ["demo", "--data", str(cifar), "--output", str(tmp_path / "demo"), "--epochs", "2"]
    assert main(command) == 0
    path = capsys.readouterr().out.splitlines()[-1]
    assert path == str(tmp_path / "demo" / "report.html")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.?https?:", page)
    for text in ("15-13-7-3", "test accuracy after merging", "receptive field", "Confusion matrix"):
        assert text in page
    before, after = (re.search(rf"accuracy {word} merging</td><td>([\d.]+%)", page)[1] for word in ("before", "after"))
    assert before == after
    assert (tmp_path / "demo" / "large" / "merged.safetensors").exists()
    # both networks are complete: nothing is trained again
    weights = (tmp_path / "demo" / "small" / "model.safetensors").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "demo" / "small" / "model.safetensors").read_bytes() == weights
    assert main([*command[:-1], "3"]) == 2
    assert "large/last.ckpt is of another recipe (epochs was 2, now 3)" in capsys.readouterr().err


def test_a_demo_of_no_epoch_is_refused_before_anything_is_made(cifar, tmp_path, capsys):
    assert main(["demo", "--data", str(cifar), "--output", str(tmp_path / "demo"), "--epochs", "0"]) == 2
    assert capsys.readouterr().err == "replknet demo: epochs must be positive, got 0\n"
    assert not (tmp_path / "demo").exists()
