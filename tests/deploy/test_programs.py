"""Files of torch.export and AOTInductor: programs, which run for those who trust them, and never with a pickle."""

import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from matrix import matrix
from replknet import deploy
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.deploy import ExportedError, files, programs
from replknet.deploy.files import card_in
from replknet.models import Description, save_model
from replknet.models.replknet import CONFIGS
from replknet.tasks.classification.export import card_of, export_classifier
from replknet.tasks.files import load, load_network

DESCRIPTION = Description(config=CONFIGS["replknet_test"], classes=("a", "b", "c"), num_classes=3, image_size=64)
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
MODEL = "models/model.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network, and its file."""
    torch.manual_seed(0)
    model, path = DESCRIPTION.build().eval(), tmp_path_factory.mktemp("programs") / "net.pt2"
    export_classifier(model, card_of(DESCRIPTION), path, "pt2")
    return model, path


class Payload:
    """Makes a file when it is unpickled, and is no harm beside that."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path, contents, root="net"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(f"{root}/{name}", data)
    return path


def saved(marker):
    """What torch.load takes."""
    content = io.BytesIO()
    torch.save((Payload(marker),), content)
    return content.getvalue()


def asking(config, entry, record, kind="data/weights", flag=True):
    """A change of an archive's members: a record that is read as a pickle."""

    def change(found, marker):
        entries = json.loads(found[config])
        entries["config"][entry] = {
            "path_name": record,
            "is_param": False,
            "use_pickle": flag,
            "tensor_meta": None,
        }
        found[config] = json.dumps(entries).encode()
        found[f"{kind}/{record}"] = pickle.dumps(Payload(marker)) if "opaque" in record else saved(marker)

    return change


def holding(name, more=()):
    def change(found, marker):
        found[name] = saved(marker)
        for other in more:
            found[other] = b"2.0" if other == "version" else saved(marker)

    return change


def text(found, marker):
    """A size that is computed by running it, among the shapes of the graph."""
    code = f"__import__('pathlib').Path({str(marker)!r}).touch() or Integer(3)"
    program = json.loads(found[MODEL])
    for value in program["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code
    found[MODEL] = json.dumps(program).encode()


PICKLES = {
    "weights": asking(WEIGHTS, "head.weight", "weight_900"),
    "weights, of a true text": asking(WEIGHTS, "head.weight", "weight_900", flag="false"),
    "constants": asking(CONSTANTS, "c", "tensor_900", "data/constants"),
    "objects": asking(CONSTANTS, "c", "opaque_obj_0", "data/constants"),
    "older weights": holding("data/weights/model.pt"),
    "older constants": holding("data/constants/model.pt"),
    "samples": holding(SAMPLES),
}


def changed(path, change, folder):
    marker, found = folder / "marker", members(path)
    change(found, marker)
    return write(folder / "hostile.pt2", found), marker


@pytest.mark.parametrize("place", [*PICKLES, "text"])
def test_nothing_in_a_file_runs_without_trust(place, made, tmp_path, capsys):
    path, marker = changed(made[1], {**PICKLES, "text": text}[place], tmp_path)
    for read in (load, load_network, card_in):
        with pytest.raises(ExportedError, match=r"hostile\.pt2 is a program: reading a \.pt2 file runs code"):
            read(path)
    assert main(["predict", str(path), str(PHOTOS[0])]) == 2
    assert main(["eval", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all("--trust (in Python trust=True) runs it; else ask them for .onnx or .xml" in line for line in told)
    assert not marker.exists()


@pytest.mark.parametrize("place", PICKLES)
def test_no_pickle_runs_with_trust(place, made, tmp_path, capsys):
    path, marker = changed(made[1], PICKLES[place], tmp_path)
    with pytest.raises(ExportedError, match=r"a pickle.*which could run any code"):
        load(path, trust=True)
    assert main(["predict", str(path), str(PHOTOS[0]), "--trust"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not marker.exists()


def opened(read, path):
    """Open a file whose damage matters no longer: what counts is what ran before it was found."""
    with suppress(Exception):
        read(path)


@pytest.mark.parametrize("place", matrix([name for name in PICKLES if name != "objects"], ["weights"]))
def test_the_payloads_are_real(place, made, tmp_path):
    # else the tests above could pass for another reason
    path, marker = changed(made[1], PICKLES[place], tmp_path)
    opened(torch.export.load, path)
    assert marker.exists()


def test_a_trusted_program_may_run_text(made, tmp_path):
    path, marker = changed(made[1], text, tmp_path)
    opened(lambda path: load(path, trust=True), path)
    assert marker.exists()


def test_the_oldest_archives_are_refused(tmp_path):
    names = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt")
    path, marker = tmp_path / "old.pt2", tmp_path / "marker"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.0")
        for name in (*names, "serialized_example_inputs.pt"):
            archive.writestr(name, saved(marker))
    with pytest.raises(ExportedError, match=r"old\.pt2"):
        load(path, trust=True)
    assert not marker.exists()


def test_our_files_hold_no_pickle_and_run(made, tmp_path):
    model, path = made
    found = members(path)
    assert found[SAMPLES] == b""
    assert not any(data.startswith((b"PK", b"\x80")) for name, data in found.items() if "weight_" not in name)
    network = load_network(path, trust=True)
    assert network.description.classes == ("a", "b", "c")
    x = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_older_file_of_ours_says_what_to_do(tmp_path):
    source = Path(__file__).parents[1] / "ops" / "data" / "operator_0.1.pt2"
    path = shutil.copy(source, tmp_path / "older.pt2")
    with pytest.raises(ExportedError, match=r"older\.pt2 holds sample inputs as a pickle, .*: export it again"):
        load(path, trust=True)


def other_case(path, folder):
    """Torch finds a member whatever its case is."""
    found = members(path)
    found["data/weights/MODEL.pt"] = b"x"
    return write(folder / "x.pt2", found)


def twice(path, folder):
    write(folder / "x.pt2", members(path))
    with zipfile.ZipFile(folder / "x.pt2", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(f"net/{MODEL}", b"{}")
    return folder / "x.pt2"


def two_folders(path, folder):
    write(folder / "x.pt2", members(path))
    with zipfile.ZipFile(folder / "x.pt2", "a") as archive:
        archive.writestr("other/models/model.json", b"{}")
    return folder / "x.pt2"


def backslash(path, folder):
    found = members(path)
    found["data\\weights\\model.pt"] = b"x"
    return write(folder / "x.pt2", found)


def appended(path, folder):
    """Two archives in one file: a reader may take either."""
    (folder / "x.pt2").write_bytes(path.read_bytes() + path.read_bytes())
    return folder / "x.pt2"


def two_names(path, folder):
    """A member whose own header has another name than the list of members."""
    data = path.read_bytes()
    at = data.index(MODEL.encode())
    (folder / "x.pt2").write_bytes(data[:at] + MODEL.upper().encode() + data[at + len(MODEL) :])
    return folder / "x.pt2"


def packed(path, folder):
    with zipfile.ZipFile(folder / "x.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members(path).items():
            archive.writestr(f"net/{name}", data)
    return folder / "x.pt2"


def a_library(path, folder):
    found = members(path)
    found["data/aotinductor/model/x.so"] = b"\x7fELF"
    return write(folder / "x.pt2", found)


def another_model(path, folder):
    found = members(path)
    found["models/other.json"] = found[MODEL]
    return write(folder / "x.pt2", found)


def out_of_nothing(path, folder):
    """A weight without a record and of any size."""
    found = members(path)
    config = json.loads(found[WEIGHTS])
    entry = next(iter(config["config"].values()))
    entry["tensor_meta"]["sizes"] = [{"as_int": 10**6}] * 2
    found[f"data/weights/{entry['path_name']}"] = b""
    found[WEIGHTS] = json.dumps(config).encode()
    return write(folder / "x.pt2", found)


def cut(path, folder):
    (folder / "x.pt2").write_bytes(path.read_bytes()[:1000])
    return folder / "x.pt2"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_case, "holds a pickle, data/weights/MODEL.pt"),
        (twice, "has a member net/models/model.json that does not belong there"),
        (two_folders, "has a member other/models/model.json that does not belong there"),
        (backslash, r"has a member net/data\weights\model.pt that does not belong there"),
        (appended, "is no plain archive"),
        (two_names, "cannot be read as an archive of torch.export"),
        (packed, "has members that are larger than the file"),
        (a_library, "has a member net/data/aotinductor/model/x.so that does not belong there"),
        (another_model, "has a member net/models/other.json that does not belong there"),
        (out_of_nothing, "lacks the 1,000,000,000,000 numbers of"),
        (cut, "cannot be read as an archive of torch.export"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_archive_is_as_ours_or_refused(make, told, made, tmp_path):
    path = make(made[1], tmp_path)
    with pytest.raises(ExportedError) as found:
        load(path, trust=True)
    assert told in str(found.value)
    assert "\n" not in str(found.value)


def test_a_library_is_a_program_too(made, tmp_path):
    path = tmp_path / "net.aoti.pt2"
    write(path, {"data/aotinductor/model/x.so": b"\x7fELF", "archive_format": b"pt2", "archive_version": b"0"})
    with pytest.raises(ExportedError, match=r"net\.aoti\.pt2 is a program"):
        load(path)
    with pytest.raises(ExportedError, match=r"net\.aoti\.pt2 cannot be read as an archive of AOTInductor"):
        load(path, trust=True)
    shutil.copy(made[1], path)
    with pytest.raises(ExportedError, match=r"net\.aoti\.pt2 has a member .* that does not belong there"):
        load(path, trust=True)


@pytest.mark.parametrize("as_json", matrix([False, True], [False]))
def test_export_says_that_predict_needs_trust(as_json, tmp_path, capsys):
    save_model(DESCRIPTION.build(), tmp_path / "net.safetensors", DESCRIPTION)
    path = tmp_path / "a net.pt2"
    command = ["export", str(tmp_path / "net.safetensors"), "--to", "pt2", "-o", str(path)]
    assert main([*command, *["--json"] * as_json]) == 0
    told = capsys.readouterr().out
    wanted = f"replknet predict '{path}' IMAGE --trust"
    if as_json:
        assert json.loads(told)["predict"] == wanted
    else:
        line = f"it is a program, so that reading it runs code and asks for trust: {wanted}"
        assert told.splitlines()[1] == line
    assert main(["predict", str(path), str(PHOTOS[0]), "--trust"]) == 0
    assert capsys.readouterr().out.startswith(str(PHOTOS[0]))


def test_trust_is_explained_in_the_help(capsys):
    for command in ("predict", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "which is a program" in " ".join(capsys.readouterr().out.split())


def test_what_is_not_trusted_needs_no_torch_export(made, monkeypatch):
    monkeypatch.setattr(programs, "_members", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(deploy.ExportedError):
        load(os.fspath(made[1]))


def test_a_program_that_fails_only_when_it_runs_is_a_line(tmp_path, monkeypatch):
    def fails(x):
        raise RuntimeError("expected dilation to be a list of 2 values\nand a stack")

    path = tmp_path / "net.pt2"
    path.touch()
    card = json.dumps(card_of(DESCRIPTION).__dict__)
    monkeypatch.setitem(files._READERS, "pt2", lambda path: (card, fails))
    network = load(path, trust=True)
    with pytest.raises(ExportedError, match=r"net\.pt2 cannot be read as .*: expected dilation .* 2 values; export it"):
        network(torch.zeros(1, 3, 64, 64))
