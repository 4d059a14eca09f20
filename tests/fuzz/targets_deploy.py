"""Files for other runtimes: ONNX and OpenVINO, which are data, and torch.export's archives, which are programs."""

import gc
import json
import re
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fuzz.frame import Target
from fuzz.mutators import extreme, mutated, mutated_json, mutated_text, mutated_zip, zip_members, zip_of
from replknet.deploy import ExportedError
from replknet.deploy.cards import KEY
from replknet.models import CheckpointError, Description
from replknet.models.replknet import RepLKNetConfig
from replknet.tasks.classification.export import card_of, export_classifier
from replknet.tasks.files import load_network
from replknet.tasks.segmentation.export import export_segmenter, segmentation_card
from replknet.tasks.segmentation.files import SegmentationDescription

_STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
# small, since runtimes take long to read and to plan
_CONFIG = RepLKNetConfig(kernels=(5,), depths=(1,), channels=(8,), small_kernel=3)
_CLASSIFIER = Description(config=_CONFIG, classes=("a", "b", "c"), num_classes=3, image_size=64, **_STATISTICS)
_SEGMENTER = SegmentationDescription(
    backbone="replknet_test", network={}, classes=("sky", "road"), palette=((0, 0, 255), (90, 90, 90)), channels=8,
    auxiliary_channels=None, align_corners=False, scale=None, window=None, stride=None, **_STATISTICS,
)  # fmt: skip


@cache
def _files(to: str, segmenter: bool = False) -> dict[str, bytes]:
    """Ending -> bytes of each file of a small network."""
    torch.manual_seed(0)
    ending = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}[to]
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"net{ending}"
        if segmenter:
            export_segmenter(_SEGMENTER.build(), segmentation_card(_SEGMENTER), path, to)
        else:
            export_classifier(_CLASSIFIER.build(), card_of(_CLASSIFIER), path, to)
        found = {file.suffix: file.read_bytes() for file in Path(folder).iterdir()}
    # torch.export leaves a million objects, which the frame's collector would look at before every input
    gc.collect()
    gc.freeze()
    return found


def _written(folder: Path, files: dict[str, bytes], first: str) -> Path:
    for ending, data in files.items():
        (folder / f"net{ending}").write_bytes(data)
    return folder / f"net{first}"


def _used(path: Path, trust: bool = False) -> object:
    """Load a file, and use the network and its description as a prediction does."""
    network = load_network(path, trust=trust)
    description = network.description
    with torch.no_grad():
        found = network.model(torch.zeros(1, 3, 48, 40))
    return found.argmax(1), len(description.classes), description.mean


# ---- ONNX

_NUMBERS = (0, -1, 1, 3, 7, 1000, 65_536, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**9, 20_000)
_OPERATORS = (
    *("Loop", "If", "ConstantOfShape", "Expand", "Tile", "Resize", "Pad", "Range", "NonMaxSuppression", "Scan", "LSTM"),
    *("TopK", "Gather", "Einsum", "ConvTranspose", "QLinearConv", "DequantizeLinear", "Where", "Split", "Slice", "Add"),
    *("RoiAlign", "MatMul", "Reshape", "Transpose", "Cast", "MaxPool", "Identity", "Softmax", "ScatterND", "Conv"),
)
_PLACES = ("../../etc/passwd", "/etc/passwd", "net.onnx", "data", "", "a/b", "x" * 300, "\0", "nul:", "..")


@cache
def _graph() -> Any:
    import onnx

    return onnx.load_model_from_string(_files("onnx")[".onnx"])


def _make_onnx(random: Random, folder: Path) -> Path:
    if random.random() < 0.3:
        return _written(folder, {".onnx": mutated(random, _files("onnx")[".onnx"])}, ".onnx")
    model = deepcopy(_graph())
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        random.choice(_CHANGES)(random, model)
    return _written(folder, {".onnx": model.SerializeToString()}, ".onnx")


def _tensor(random: Random, model: Any) -> None:
    tensor, what = random.choice(model.graph.initializer), random.random()
    if what < 0.3 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_NUMBERS)
    elif what < 0.5:
        tensor.dims.append(random.choice(_NUMBERS))
    elif what < 0.7:
        tensor.data_type = random.randrange(26)
    else:
        size = len(tensor.raw_data)
        tensor.raw_data = random.choice((b"", tensor.raw_data[: size // 2], tensor.raw_data * 2, b"\xff" * size))


def _outside(random: Random, model: Any) -> None:
    """Weights in another file."""
    tensor = random.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", random.choice(_PLACES)), ("offset", str(random.choice(_NUMBERS))), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _node(random: Random, model: Any) -> None:
    graph, what = model.graph, random.random()
    node = random.choice(graph.node)
    names = (*(other.output[0] for other in graph.node), *(tensor.name for tensor in graph.initializer), "", "image")
    if what < 0.35:
        node.op_type = random.choice((*_OPERATORS, *(other.op_type for other in graph.node)))
    elif what < 0.65 and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(names)
    elif what < 0.75:
        node.output[0] = random.choice(names)
    elif what < 0.8:
        node.domain = random.choice(("com.microsoft", "ai.onnx.ml", "x"))
    elif what < 0.9:
        graph.node.add().CopyFrom(node)
    else:
        graph.node.remove(node)


def _attribute(random: Random, model: Any) -> None:
    node = random.choice(model.graph.node)
    if not node.attribute:
        return
    attribute, what = random.choice(node.attribute), random.random()
    if what < 0.1:
        attribute.type = random.randrange(15)
    elif what < 0.2:
        node.attribute.remove(attribute)
    elif attribute.ints and what < 0.3:
        attribute.ints.extend([random.choice(_NUMBERS)] * random.choice((1, 3, 1000)))
    elif attribute.ints:
        attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_NUMBERS)
    elif attribute.s:
        attribute.s = random.choice((b"", b"SAME_UPPER", b"linear", b"nearest", b"cubic", b"x" * 5000, b"\xff"))
    else:
        attribute.i, attribute.f = random.choice(_NUMBERS), random.choice((float("nan"), 1e38, -1.0, 0.0))


def _value(random: Random, model: Any) -> None:
    graph = model.graph
    tensor = random.choice([*graph.input, *graph.output, *graph.value_info]).type.tensor_type
    if tensor.shape.dim and random.random() < 0.7:
        random.choice(tensor.shape.dim).dim_value = random.choice(_NUMBERS)
    else:
        tensor.elem_type = random.randrange(26)


def _result(random: Random, model: Any) -> None:
    """Another node's output as the file's, or a second one."""
    name = random.choice(model.graph.node).output[0]
    if random.random() < 0.5:
        model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[-1].name = name


def _version(random: Random, model: Any) -> None:
    model.ir_version = random.choice((*range(14), *_NUMBERS)) if random.random() < 0.5 else model.ir_version
    model.opset_import[0].version = random.choice((*range(7, 28), *_NUMBERS))


def _card(random: Random, model: Any) -> None:
    # protobuf takes no text that is no UTF-8
    card = mutated_text(random, json.loads(json.dumps(asdict(card_of(_CLASSIFIER))))).decode(errors="replace")
    model.metadata_props[0].value = card


_CHANGES = (_tensor, _outside, _node, _node, _attribute, _attribute, _value, _result, _version, _card, _card)


# ---- OpenVINO

_WORDS = ("0", "-1", "1", "2147483648", "9223372036854775807", "20000", "x", "", "1.5", "nan", "f32", "i64", "u8", "..")
_PARTS = (
    "<",
    ">",
    "&",
    '"',
    "<layer>",
    "</layers>",
    "&lol;",
    "<!--",
    "]]>",
    '<!DOCTYPE a [<!ENTITY l "lol">]>',
    "\x1b",
)
_LAYERS = (
    "Loop",
    "If",
    "TensorIterator",
    "Broadcast",
    "Tile",
    "Interpolate",
    "Range",
    "Multiply",
    "ReadValue",
    "Gather",
)


def _make_openvino(random: Random, folder: Path) -> Path:
    files = dict(_files("openvino", random.random() < 0.4))
    text = files[".xml"].decode()
    what = random.random()
    if what < 0.1:
        files[".xml"] = mutated(random, files[".xml"])
    elif what < 0.25:
        found = re.search(rf'<{KEY} value="([^"]*)"', text)
        assert found is not None
        card = mutated_json(random, json.loads(json.dumps(asdict(card_of(_CLASSIFIER)))))
        escaped = json.dumps(card).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        files[".xml"] = (text[: found.start(1)] + escaped + text[found.end(1) :]).encode(errors="replace")
    else:
        for _ in range(random.choice((1, 1, 2, 3, 8))):
            text = _changed(random, text)
        files[".xml"] = text.encode()
    if random.random() < 0.2:
        files[".bin"] = random.choice((b"", files[".bin"][: random.randrange(2000)], random.randbytes(3000)))
    elif random.random() < 0.05:
        del files[".bin"]
    return _written(folder, files, ".xml")


def _changed(random: Random, text: str) -> str:
    """A text of XML with another value, another type of a layer, a layer or an edge more or less, or a cut."""
    what = random.random()
    pattern, new = {
        0: (r'="(-?[\d., ]+)"|<dim>(-?\d+)<|shape="([^"]*)"', random.choice(_WORDS)),
        1: (r'="([^"]*)"', random.choice((*_WORDS, *_LAYERS))),
        2: (r' type="(\w+)"', random.choice((*_LAYERS, *re.findall(r' type="(\w+)"', text)[:200]))),
    }.get(int(4 * what), ("", ""))
    if pattern:
        found = list(re.finditer(pattern, text))
        if not found:
            return text
        match = random.choice(found)
        start, end = next(match.span(i) for i in range(1, len(match.groups()) + 1) if match[i] is not None)
        return text[:start] + new + text[end:]
    if what < 0.9:
        found = list(re.finditer(random.choice((r"<layer .*?</layer>", r"<edge [^>]*>")), text, re.DOTALL))
        if not found:
            return text
        match, other = random.choice(found), random.choice(found)
        return text[: match.start()] + random.choice(("", other[0], match[0] * 2)) + text[match.end() :]
    place = random.randrange(len(text) + 1)
    return text[:place] + random.choice(_PARTS) + text[place + random.choice((0, 0, 10, 3000)) :]


# ---- torch.export


def _make_pt2(random: Random, folder: Path) -> Path:
    data = _files("pt2")[".pt2"]
    if random.random() < 0.15:
        return _written(folder, {".pt2": mutated(random, data)}, ".pt2")
    members = zip_members(data)
    what = random.random()
    if what < 0.3:
        return _written(folder, {".pt2": mutated_zip(random, members)}, ".pt2")
    root = next(iter(members)).partition("/")[0]
    if what < 0.4:
        name = random.choice(
            ("data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/custom_obj_0", "models/other.json")
        )
        members[f"{root}/{name}"] = mutated(random, b"\x80\x02cbuiltins\nexit\n)R.")
    else:
        names = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
        name = f"{root}/{random.choice((*names, 'models/model.json', f'extra/{KEY}'))}"
        members[name] = mutated_text(random, json.loads(members[name]))
        if random.random() < 0.1:
            members[name] = json.dumps(extreme(random)).encode()
    return _written(folder, {".pt2": zip_of(members)}, ".pt2")


def _read_program(path: Path) -> object:
    try:
        network = _used(path)
    except ExportedError as error:
        if "is a program" not in str(error):
            raise AssertionError(f"it was opened without trust: {error}") from error
        return _used(path, trust=True)
    raise AssertionError(f"a program ran without trust: {network}")


_ERRORS = (ExportedError, CheckpointError)
TARGETS = (
    Target("onnx", "is an ONNX file run, or refused in a line", _make_onnx, _used, _ERRORS),
    Target("openvino", "is an OpenVINO file run, or refused in a line", _make_openvino, _used, _ERRORS),
    Target(
        "pt2",
        "is a program refused without trust, and with it run, or refused in a line",
        _make_pt2,
        _read_program,
        _ERRORS,
    ),
)
