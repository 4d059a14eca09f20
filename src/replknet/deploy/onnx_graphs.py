"""ONNX files of others: what a graph may hold, checked before ONNX Runtime opens it.

A file is data. Still it can name any file of the machine as the place of its weights, and ask for any amount of memory
or time. The graph that was checked is the one that runs: the runtime is given the bytes that were read.
"""

import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replknet import limits
from replknet.deploy.cards import KEY, ExportedError, found_in
from replknet.deploy.verify import Run
from replknet.reading import Kind, reading
from replknet.shown import shown

ONNX = Kind(ExportedError, "an ONNX file that `replknet export` wrote", "export it again")
_RUNNING = Kind(ExportedError, "a network that computes", "export it again with `replknet export`")

# what the exporters of torch and the quantizer of ONNX Runtime write for our networks; all are of ONNX's own domain
_OPERATORS = frozenset(
    re.findall(
        r"\w+",
        """
        Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
        ConvTranspose DequantizeLinear Div Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
        GlobalAveragePool Greater GreaterOrEqual HardSigmoid HardSwish Identity If InstanceNormalization
        LayerNormalization Less LessOrEqual Log Loop MatMul Max MaxPool Min Mod Mul Neg NonMaxSuppression NonZero Not Or
        Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize
        RoiAlign Round ScatterElements ScatterND Shape Sigmoid Sign Size Slice Softmax Split Sqrt Squeeze Sub Tanh Tile
        TopK Transpose Unsqueeze Where
        """,
    )
)
# attributes whose numbers are pixels of a kernel
_WINDOWS = frozenset(("pads", "strides", "dilations", "kernel_shape", "output_padding"))


def open_onnx(path: Path) -> tuple[str, Run]:
    """The text of the card in a file, and a function that runs the file.

    Raises:
        ExportedError: the file is damaged or has no card, or its graph is none that `replknet export` writes.
    """
    import onnx

    with reading(path, ONNX):
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
        card = found_in(next((entry.value for entry in model.metadata_props if entry.key == KEY), None), path)
        outside = _check(model, path)
        del model
        run = _session(data, path.parent if outside else None)

    def run_checked(x: Tensor) -> Sequence[Tensor]:
        with reading(path, _RUNNING):
            return run(x)

    return card, run_checked


def _check(model: Any, path: Path) -> bool:
    """Refuse a graph that is none of ours. Returns whether it has weights in other files, which were checked."""
    if model.functions or model.training_info:
        raise _foreign(path, "functions or a training")
    inputs = [(value.name, value.type.tensor_type.elem_type) for value in model.graph.input]
    # 1: float32
    if inputs != [("image", 1)]:
        names = ", ".join(name for name, _ in inputs) or "nothing"
        raise _foreign(path, f"the inputs {names}, not image alone in float32")
    outside = False
    nodes = 0
    for graph in _graphs(model.graph):
        nodes += len(graph.node)
        if graph.sparse_initializer:
            raise _foreign(path, "sparse weights")
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
                raise _foreign(path, f"the operator {node.domain}{node.domain and '.'}{node.op_type}")
            for attribute in node.attribute:
                _check_numbers(attribute)
                if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                    raise _foreign(path, "sparse weights")
                if any(tensor.data_location == tensor.EXTERNAL for tensor in (attribute.t, *attribute.tensors)):
                    raise _foreign(path, "constants in other files")
        for tensor in graph.initializer:
            if tensor.data_location == tensor.EXTERNAL:
                _check_place(tensor, path)
                outside = True
    limits.check(nodes, limits.ENTRIES, "nodes in a graph")
    return outside


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and all graphs inside of its nodes."""
    left = [graph]
    while left:
        graph = left.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                left += attribute.graphs
                if attribute.HasField("g"):
                    left.append(attribute.g)


def _check_numbers(attribute: Any) -> None:
    window = attribute.name in _WINDOWS
    for number in (attribute.i, *attribute.ints):
        if window:
            limits.check(abs(number), limits.KERNEL, f"pixels as {attribute.name} of a kernel")
        else:
            limits.check(abs(number), limits.CHANNELS, f"as the attribute {shown(attribute.name)} of a node")


def _check_place(tensor: Any, path: Path) -> None:
    """Refuse weights in another file, unless it lies beside the graph and has them."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    # a plain name: no folder, no device, no way up
    if not location or location in (".", "..") or any(c in location for c in "/\\:\0"):
        raise ExportedError(
            f"{shown(path)} takes weights from {shown(location or 'nowhere')}: expected a file beside it; "
            f"{ONNX.way_out}"
        )
    beside = path.parent / location
    # os.path.lexists, since a link could point anywhere
    if not os.path.lexists(beside) or not stat.S_ISREG(beside.lstat().st_mode):
        raise ExportedError(
            f"{shown(path)} takes weights from {shown(location)} beside it, which is no plain file: copy it there, too"
        )
    found = beside.lstat()
    start, length = int(place.get("offset", 0)), int(place.get("length", 0))
    if start < 0 or length < 0 or start + length > found.st_size:
        raise ExportedError(
            f"{shown(path)} takes the bytes from {start:,} to {start + length:,} of {shown(location)}, which has "
            f"{found.st_size:,}: copy the file again"
        )


def _foreign(path: Path, what: str) -> ExportedError:
    return ExportedError(f"{shown(path)} has {shown(what)}: expected {ONNX.expected}; {ONNX.way_out}")


def _session(data: bytes, folder: Path | None) -> Run:
    """Runs a checked graph on the CPU.

    Args:
        data: the bytes of the file.
        folder: where weights in other files are; None: there are none.
    """
    import onnxruntime

    _cap_memory()
    options = onnxruntime.SessionOptions()
    # no warnings: shapes that torch's older exporter guessed cause many
    options.log_severity_level = 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)

    def run(x: Tensor) -> list[Tensor]:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        # a loop in the graph could run for ever
        timer = threading.Timer(limits.SECONDS * limits.factor(), setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            found = session.run(None, {"image": x.numpy()}, options)
        finally:
            timer.cancel()
        if not all(hasattr(output, "dtype") for output in found):
            raise TypeError("it returns lists or texts, not tensors")
        return [torch.from_numpy(output) for output in found]

    return run


@cache
def _cap_memory() -> None:
    """Let a graph ask for no more memory than there is: else the system ends the process."""
    import onnxruntime

    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = int(min(limits.MEMORY * limits.factor(), machine * 3 // 4))
    arena, default = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    where = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, default)
    onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg({"max_mem": most}))
