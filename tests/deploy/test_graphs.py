"""Files for ONNX Runtime and OpenVINO are data: what a graph or its card may ask for, and one line for all else."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as opset

from replknet import limits
from replknet.cli.main import main
from replknet.data.images import PHOTOS
from replknet.deploy import ExportedError
from replknet.models import CheckpointError, Description
from replknet.models.replknet import CONFIGS
from replknet.tasks.classification.export import card_of
from replknet.tasks.files import load, load_network

DESCRIPTION = Description(config=CONFIGS["replknet_test"], classes=("a", "b", "c"), num_classes=3, image_size=16)
CARD = json.loads(json.dumps(asdict(card_of(DESCRIPTION))))
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
WEIGHT = np.arange(9, dtype="f4").reshape(3, 3, 1, 1)


def value(name, kind=FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes=None, weights=None, card=CARD, inputs=(("image", FLOAT),), output=FLOAT):
    """A network of one convolution and a mean, with a card; or one of these nodes."""
    nodes = nodes or [
        helper.make_node("Conv", ["image", "weight"], ["maps"]),
        helper.make_node("ReduceMean", ["maps", "sides"], ["logits"], keepdims=0),
    ]
    weights = {"weight": WEIGHT, "sides": np.array([2, 3])} if weights is None else weights
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        nodes, "net", [value(name, kind, shape) for name, kind in inputs], [value("logits", output)], tensors
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    entry = made.metadata_props.add()
    entry.key, entry.value = "replknet", card if isinstance(card, str) else json.dumps(card)
    return made


def save(made, folder):
    (folder / "net.onnx").write_bytes(made.SerializeToString())
    return folder / "net.onnx"


def refused(path):
    """The one line that a person gets, from Python and from the command."""
    with pytest.raises(ExportedError) as found:
        load(path)(torch.zeros(1, 3, 20, 24))
    text = str(found.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def test_a_plain_network_runs(tmp_path):
    path = save(model(), tmp_path)
    x = torch.randn(2, 3, 20, 24)
    wanted = torch.nn.functional.conv2d(x, torch.from_numpy(WEIGHT)).mean((2, 3))
    torch.testing.assert_close(load(path)(x), wanted)


# ---- ONNX


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    for data in (b"", b"\xff" * 100, model().SerializeToString()[:100], PHOTOS[0].read_bytes()):
        path.write_bytes(data)
        assert main(["predict", str(path), str(PHOTOS[0])]) == 2
        told = capsys.readouterr()
        assert len(told.err.splitlines()) == 1, told.err
        assert "cannot be read as an ONNX file" in told.err or "says nothing about its classes" in told.err
        # ONNX Runtime prints what it tries after an error
        assert told.out == ""


LOOP = helper.make_graph(
    [helper.make_node("Identity", ["c"], ["again"]), helper.make_node("Add", ["v", "v"], ["sum"])],
    "body",
    [value("i", INT, []), value("c", TensorProto.BOOL, []), value("v")],
    [value("again", TensorProto.BOOL, []), value("sum")],
)
FOREIGN = {
    "operator": (model([helper.make_node("LSTM", ["image"], ["logits"])]), "has the operator LSTM: expected an ONNX"),
    "domain": (
        model([helper.make_node("Gelu", ["image"], ["logits"], domain="com.microsoft")]),
        "has the operator com.microsoft.Gelu",
    ),
    "inputs": (model(inputs=[("image", FLOAT), ("other", FLOAT)]), "has the inputs image, other, not image alone"),
    "input": (model(inputs=[("image", INT)]), "not image alone in float32"),
    "window": (
        model([helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[9000] * 4)], {"weight": WEIGHT}),
        "asks for 9,000 pixels as pads of a kernel, more than the 255 allowed",
    ),
    "number": (
        model([helper.make_node("Concat", ["image"], ["logits"], axis=2**40)], {}),
        "as the attribute axis of a node",
    ),
    "shape": (model([helper.make_node("Identity", ["image"], ["logits"])], {}), "returns logits as [1, 3, 20, 24] in"),
    "dtype": (
        model([helper.make_node("Shape", ["image"], ["logits"])], {}, output=INT),
        "returns logits as [4] in torch.int64",
    ),
    "finite": (
        model(weights={"weight": WEIGHT * np.float32("nan"), "sides": np.array([2, 3])}),
        "returns logits that are not finite numbers",
    ),
    "missing": (model([helper.make_node("Add", ["image", "nothing"], ["logits"])], {}), "cannot be read as an ONNX"),
    "memory": (
        model(
            [
                helper.make_node("ConstantOfShape", ["size"], ["much"]),
                helper.make_node("ReduceMean", ["much"], ["one"]),
                helper.make_node("Add", ["one", "image"], ["logits"]),
            ],
            {"size": np.array([10**13])},
        ),
        "cannot be read as a",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_graph_is_refused(name, tmp_path):
    made, told = FOREIGN[name]
    assert told in refused(save(made, tmp_path))


def test_a_loop_ends_after_the_time_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    node = helper.make_node("Loop", ["n", "yes", "image"], ["logits"], body=LOOP)
    path = save(model([node], {"n": np.int64(2**50), "yes": np.bool_(True)}), tmp_path)
    assert "net.onnx cannot be read as a network that computes: " in refused(path)


def outside(folder, location, offset=0, length=36):
    """A network whose weights are in another file."""
    made = model()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return save(made, folder)


def test_weights_beside_the_graph_are_read(tmp_path):
    (tmp_path / "net.onnx.data").write_bytes(bytes(64) + WEIGHT.tobytes())
    x = torch.randn(1, 3, 20, 24)
    (tmp_path / "plain").mkdir()
    wanted = load(save(model(), tmp_path / "plain"))(x)
    torch.testing.assert_close(load(outside(tmp_path, "net.onnx.data", 64))(x), wanted)


def test_weights_elsewhere_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "net"
    folder.mkdir()
    for place in ("../secret", str(tmp_path / "secret"), "/etc/passwd", "..", "", "a/../../secret", "\\\\host\\x"):
        assert "expected a file beside it" in refused(outside(folder, place))
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    for place in ("link", "pipe", ".hidden"):
        assert f"takes weights from {place} beside it, which is no plain file" in refused(outside(folder, place))
    (folder / "data").write_bytes(bytes(20))
    assert "takes the bytes from 0 to 36 of data, which has 20" in refused(outside(folder, "data"))
    assert "takes the bytes from 1,000,000,000,000 to" in refused(outside(folder, "data", 10**12))
    assert "takes the bytes from -8 to 28" in refused(outside(folder, "data", -8))


# ---- the card

DEEP = "[" * 100_000
CARDS = {
    "no JSON": ("{", "cannot be read as a card of replknet's: Expecting property name"),
    "no object": ("[1]", "it must be an object, got [1]"),
    "nested": (DEEP, "it is nested too deeply"),
    "no number": (json.dumps({**CARD, "crop_pct": float("nan")}), "NaN is no number of JSON"),
    "infinite": (json.dumps(CARD).replace("0.875", "1e999"), "crop_pct in the card must be a number, got inf"),
    "task": ({**CARD, "task": ["classification"]}, "task in the card must be a text, got"),
    "unknown task": ({**CARD, "task": "depth\x1b[2J"}, r"is for depth\x1b[2J, which this version does not know"),
    "sides": ({**CARD, "sides": [9, "x"]}, "sides in the card must be a list of 2 whole numbers"),
    "huge sides": ({**CARD, "sides": [9, 10**9]}, "asks for 1,000,000,000 pixels in the side of an image"),
    "no range": ({**CARD, "sides": [9, 5]}, "sides from 9 to 5 pixels, which is no range"),
    "image": ({**CARD, "image_size": 20_000}, "asks for 20,000 pixels in the side of an image, more than the 8,192"),
    "classes": ({**CARD, "classes": [1, 2, 3]}, "classes in the card must be a list of texts, got"),
    "number of classes": ({**CARD, "num_classes": 4}, "it names 3 of 4 classes"),
    "many classes": ({**CARD, "classes": [], "num_classes": 10**9}, "asks for 1,000,000,000 classes"),
    "a long name": ({**CARD, "classes": ["a", "b", "x" * 10**6]}, "1,000,000 letters in the name of a class"),
    "crop": ({**CARD, "crop_pct": 0}, "it crops 0 of an image to 16 pixels"),
    "deviation": ({**CARD, "std": [0, 1, 1]}, "std must be positive"),
    "missing": ({key: CARD[key] for key in CARD if key != "mean"}, "lacks the field mean"),
    "unknown": ({**CARD, "a\nb": 1}, r"has the unknown field a\nb"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_checked(name, tmp_path):
    card, told = CARDS[name]
    path = save(model(card=card), tmp_path)
    with pytest.raises((ExportedError, CheckpointError)) as found:
        load_network(path)
    assert told in str(found.value)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


# ---- OpenVINO


@pytest.fixture
def xml(tmp_path):
    """The same network as a file of OpenVINO."""
    image = opset.parameter([-1, 3, -1, -1], np.float32, name="image")
    weight = opset.constant(WEIGHT)
    maps = opset.convolution(image, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    logits = opset.reduce_mean(maps, opset.constant(np.array([2, 3])), False)
    made = openvino.Model([logits], [image], "net")
    made.set_rt_info(json.dumps(CARD), "replknet")
    openvino.save_model(made, tmp_path / "net.xml", compress_to_fp16=False)
    return tmp_path / "net.xml"


def test_a_plain_network_runs_in_openvino(xml):
    x = torch.randn(2, 3, 20, 24)
    wanted = torch.nn.functional.conv2d(x, torch.from_numpy(WEIGHT)).mean((2, 3))
    torch.testing.assert_close(load(xml)(x), wanted)


ENTITIES = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;">]>'
CHANGES = {
    "no XML": (lambda text: text[:200], "cannot be read as an OpenVINO file"),
    "entities": (lambda text: text.replace("<net", f"{ENTITIES}<net"), "it declares texts of its own"),
    "no card": (lambda text: text.replace("<replknet", "<other"), "says nothing about its classes and images"),
    "type": (lambda text: text.replace('type="Convolution"', 'type="Loop"'), "it has a layer of type Loop in opset1"),
    # OpenVINO would end the process
    "one input": (lambda text: text.replace('type="Result"', 'type="Broadcast"'), "it has a layer of type Broadcast"),
    "inputs": (
        lambda text: text.replace('type="Result"', 'type="Add"'),
        "type Add has 1 inputs and 0 outputs",
    ),
    "twice": (lambda text: text.replace('layer id="2"', 'layer id="1"'), "two of its layers are number 1"),
    "edge": (lambda text: text.replace('from-layer="1"', 'from-layer="0"'), None),
    "no edge": (lambda text: text.replace('<edge from-layer="1"', '<x from-layer="1"'), "it has x among its edges"),
    "circle": (
        lambda text: text.replace('from-layer="0" from-port="0"', 'from-layer="2" from-port="2"'),
        "its layers need each other in a circle",
    ),
    "window": (lambda text: text.replace('strides="1, 1"', 'strides="1, 90000"'), "90,000 pixels as strides"),
    "offset": (lambda text: text.replace('offset="0"', 'offset="99"'), "a constant ends at byte 135 of its weights"),
    "size": (lambda text: text.replace('size="36"', 'size="999"'), "a constant of shape [3, 3, 1, 1] has 999 bytes"),
    "shape": (lambda text: text.replace('"3, 3, 1, 1"', '"3, 3, 1, 10000000000"'), "has 36 bytes"),
    "dim": (lambda text: text.replace("<dim>3</dim>", "<dim>99999999999</dim>"), "a layer has a side of 99999999999"),
    "dtype": (lambda text: text.replace('element_type="f32"', 'element_type="f64"'), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_graph_is_refused(name, xml):
    change, told = CHANGES[name]
    before = xml.read_text()
    xml.write_text(change(before))
    assert xml.read_text() != before
    text = refused(xml)
    assert (told or "net.xml cannot be read as an OpenVINO file that `replknet export` wrote: ") in text


def test_weights_that_are_missing_or_short_are_named(xml):
    weights = xml.with_suffix(".bin")
    data = weights.read_bytes()
    weights.write_bytes(data[:20])
    assert "a constant ends at byte 36 of its weights, which have 20" in refused(xml)
    weights.write_bytes(b"")
    assert "net.bin is empty: copy it again" in refused(xml)
    weights.unlink()
    assert "needs net.bin beside it, which has its weights: copy it there, too" in refused(xml)


def test_a_name_may_be_no_utf8(tmp_path, capsysbinary):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    x = torch.zeros(1, 3, 20, 24)
    assert load(save(model(), folder))(x).shape == (1, 3)
    (folder / "net.onnx").write_bytes(b"x")
    assert r"/\xff/net.onnx cannot be read" in refused(folder / "net.onnx")
