"""OpenVINO files of others: what a graph may hold, checked before OpenVINO opens it.

OpenVINO ends the process for some damaged graphs, such as a sum with one input. So the graph is read and checked here,
and OpenVINO is given what was checked, written anew, with the bytes of the `.bin` beside it.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replknet import limits
from replknet.deploy.cards import KEY, ExportedError, found_in
from replknet.deploy.verify import Run
from replknet.reading import Kind, reading
from replknet.shown import shown

OPENVINO = Kind(ExportedError, "an OpenVINO file that `replknet export` wrote", "export it again")
_RUNNING = Kind(ExportedError, "a network that computes", "export it again with `replknet export`")

# what OpenVINO and NNCF write for our networks -> number of inputs: fewest and most
_TYPES: dict[str, tuple[int, int]] = {
    name: inputs
    for inputs, names in {
        (0, 0): "Const Parameter",
        (
            1,
            1,
        ): "Abs Ceiling Clamp Convert Erf Exp Floor Gelu HSigmoid HSwish Log LogicalNot MaxPool Negative ReLU Result "
        "ShapeOf Sigmoid Sign SoftMax Softmax Sqrt Swish Tanh",
        (1, 2): "Squeeze",
        (1, 64): "Concat",
        (2, 2): "Add BitwiseAnd BitwiseOr Convolution Divide Equal FloorMod Greater GreaterEqual GroupConvolution Less "
        "LessEqual LogicalAnd LogicalOr MatMul Maximum Minimum Mod Multiply MVN NotEqual Power PRelu ReduceMax "
        "ReduceMean ReduceMin ReduceSum Reshape Subtract Transpose Unsqueeze",
        (2, 4): "Interpolate",
        (3, 3): "Gather Range Select",
        (5, 5): "FakeQuantize",
    }.items()
    for name in names.split()
}
# element type -> bytes
_BYTES = {
    **dict.fromkeys(("boolean", "i8", "u8"), 1),
    **dict.fromkeys(("i16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("i32", "u32", "f32"), 4),
    **dict.fromkeys(("i64", "u64", "f64"), 8),
}
# attributes whose numbers are pixels of a kernel
_WINDOWS = frozenset(("pads_begin", "pads_end", "strides", "dilations", "kernel", "output_padding"))
_NUMBERS = re.compile(r"-?\d+(\s*,\s*-?\d+)*")


def open_openvino(path: Path) -> tuple[str, Run]:
    """The text of the card in a file, and a function that runs the file.

    Raises:
        ExportedError: the file is damaged or has no card, or its graph is none that `replknet export` writes.
    """
    import openvino

    with reading(path, OPENVINO):
        limits.check(path.stat().st_size, limits.LIST, "bytes of a graph")
        text = path.read_bytes().decode()
        # a text that stands for a billion others is declared there; OpenVINO writes none
        if "<!" in text:
            raise ValueError("it declares texts of its own")
        root = ET.fromstring(text)
        rt_info = root.find(f"rt_info/{KEY}")
        card = found_in(None if rt_info is None else rt_info.get("value"), path)
        weights = _weights(path)
        checked = _checked(root, weights.nbytes)
        tensor = openvino.Tensor(weights, shared_memory=True)
        model = openvino.Core().read_model(checked, tensor)
        # else OpenVINO computes in bfloat16 on a processor that has it
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Tensor, _needed: object = (weights, tensor, model)) -> list[Tensor]:
        # the compiled network points into the weights and does not keep them alive
        with reading(path, _RUNNING):
            return [torch.from_numpy(output) for output in compiled(x.numpy()).values()]

    return card, run


def _weights(path: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of the file beside a graph, which stay on the disk until they are used."""
    beside = path.with_suffix(".bin")
    if not beside.is_file():
        raise ExportedError(
            f"{shown(path)} needs {shown(beside.name)} beside it, which has its weights: copy it there, too"
        )
    if not beside.stat().st_size:
        raise ExportedError(f"{shown(beside)} is empty: copy it again")
    return np.memmap(beside, np.uint8, "c")


def _checked(root: ET.Element, size: int) -> bytes:
    """The graph, written anew after each of its layers and edges was checked.

    Args:
        root: the graph.
        size: bytes of the file of weights.

    Raises:
        ValueError: the graph is none of ours.
    """
    layers, edges = root.find("layers"), root.find("edges")
    if root.tag != "net" or layers is None or edges is None:
        raise ValueError("it has no layers and edges")
    limits.check(len(layers), limits.ENTRIES, "layers")
    limits.check(len(edges), limits.ENTRIES, "edges")
    net = ET.Element("net", {"name": "net", "version": "11"})
    found: dict[str, tuple[int, int]] = {}
    copies = ET.SubElement(net, "layers")
    for layer in layers:
        copy = _layer(layer, size)
        identity = copy.attrib["id"]
        if identity in found:
            raise ValueError(f"two of its layers are number {identity}")
        found[identity] = (_ports(copy, "input"), _ports(copy, "output"))
        copies.append(copy)
    types = [copy.attrib["type"] for copy in copies]
    if types.count("Parameter") != 1 or "Result" not in types:
        raise ValueError("expected one input and an output")
    _check_order(edges, found)
    joined = ET.SubElement(net, "edges")
    for edge in edges:
        ET.SubElement(joined, "edge", dict(edge.attrib))
    return ET.tostring(net)


def _layer(layer: ET.Element, size: int) -> ET.Element:
    """A copy of a layer after its check."""
    kind, identity = layer.get("type", ""), layer.get("id", "")
    if layer.tag != "layer" or kind not in _TYPES or not re.fullmatch(r"opset\d{1,2}", layer.get("version", "")):
        raise ValueError(f"it has a layer of type {kind} in {layer.get('version')}")
    if not re.fullmatch(r"\d{1,9}", identity):
        raise ValueError(f"it has a layer with the number {identity}")
    copy = ET.Element("layer", {name: layer.attrib[name] for name in ("id", "name", "type", "version")})
    data = layer.find("data")
    if data is not None:
        _check_numbers(data.attrib)
        ET.SubElement(copy, "data", dict(data.attrib))
    if kind == "Const":
        _check_constant({} if data is None else data.attrib, size)
    if kind == "Parameter" and (data is None or data.get("element_type") != "f32"):
        raise ValueError("its images are not in float32")
    for side in ("input", "output"):
        ports = layer.find(side)
        if ports is not None:
            copy.append(_copied_ports(ports))
    inputs, outputs = _ports(copy, "input"), _ports(copy, "output")
    fewest, most = _TYPES[kind]
    if not fewest <= inputs <= most or outputs != (kind != "Result"):
        raise ValueError(f"a layer of type {kind} has {inputs} inputs and {outputs} outputs")
    numbers = [port.attrib["id"] for port in copy.iter("port")]
    if numbers != [str(i) for i in range(inputs + outputs)]:
        raise ValueError(f"a layer of type {kind} has inputs and outputs with the numbers {', '.join(numbers)}")
    return copy


def _copied_ports(ports: ET.Element) -> ET.Element:
    copy = ET.Element(ports.tag)
    for port in ports:
        if port.tag != "port":
            raise ValueError(f"it has {port.tag} among the ports of a layer")
        names: dict[str, str] = {k: v for k, v in port.attrib.items() if k in ("id", "precision", "names")}
        made = ET.SubElement(copy, "port", names)
        for dim in port:
            if dim.tag != "dim" or not re.fullmatch(r"-1|\d{1,9}", dim.text or ""):
                raise ValueError(f"a layer has a side of {dim.text}")
            ET.SubElement(made, "dim").text = dim.text
    return copy


def _ports(layer: ET.Element, side: str) -> int:
    return len(layer.findall(f"{side}/port"))


def _check_numbers(attributes: Mapping[str, str]) -> None:
    for name, text in attributes.items():
        if name in ("offset", "size", "shape") or not _NUMBERS.fullmatch(text):
            continue
        for number in map(int, text.split(",")):
            if name in _WINDOWS:
                limits.check(abs(number), limits.KERNEL, f"pixels as {name} of a kernel")
            else:
                limits.check(abs(number), limits.CHANNELS, f"as {shown(name)} of a layer")


def _check_constant(attributes: Mapping[str, str], size: int) -> None:
    """Check that the numbers of a constant are where it says."""
    start, length = int(attributes["offset"]), int(attributes["size"])
    shape = [int(side) for side in attributes["shape"].split(",") if side.strip()]
    if min(start, length, *shape, 0) < 0 or math.prod(shape) * _BYTES[attributes["element_type"]] != length:
        raise ValueError(f"a constant of shape {shape} has {length:,} bytes")
    if start + length > size:
        raise ValueError(f"a constant ends at byte {start + length:,} of its weights, which have {size:,}")


def _check_order(edges: ET.Element, layers: Mapping[str, tuple[int, int]]) -> None:
    """Check that every input has one source, and that no layer needs itself."""
    sources: dict[tuple[str, int], str] = {}
    for edge in edges:
        if edge.tag != "edge":
            raise ValueError(f"it has {edge.tag} among its edges")
        one, other = edge.attrib["from-layer"], edge.attrib["to-layer"]
        inputs, outputs = layers[other][0], sum(layers[one])
        # the ports of a layer are counted through: first its inputs, then its outputs
        out, into = int(edge.attrib["from-port"]), int(edge.attrib["to-port"])
        if not layers[one][0] <= out < outputs or not 0 <= into < inputs or (other, into) in sources:
            raise ValueError(f"layers {one} and {other} are not joined as they should be")
        sources[other, into] = one
    needed = {name: {sources.get((name, i), "") for i in range(inputs)} for name, (inputs, _) in layers.items()}
    if any("" in names for names in needed.values()):
        raise ValueError("a layer lacks an input")
    users: dict[str, list[str]] = {name: [] for name in layers}
    for name, names in needed.items():
        for source in names:
            users[source].append(name)
    left = {name: len(names) for name, names in needed.items()}
    ready = [name for name, n in left.items() if n == 0]
    done = 0
    while ready:
        done += 1
        for user in users[ready.pop()]:
            left[user] -= 1
            if not left[user]:
                ready.append(user)
    if done < len(layers):
        raise ValueError("its layers need each other in a circle")
