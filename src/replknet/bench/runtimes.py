"""One depthwise layer in other runtimes, for comparison: a model of a single convolution, NCHW, float32."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

# packages that each runtime needs
_NEEDS = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}

NAMES = tuple(_NEEDS)


def missing() -> list[str]:
    """The runtimes that are not installed."""
    return [name for name, needed in _NEEDS.items() if any(find_spec(package) is None for package in needed)]


def installed() -> dict[str, Callable[[Tensor, Tensor, int], Callable[[], Any]]]:
    """Name -> a function that prepares the timed call, from x `[N,C,H,W]`, weight `[C,1,K,K]` and threads."""
    ways = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    return {name: way for name, way in ways.items() if name not in missing()}


def _onnxruntime(x: Tensor, weight: Tensor, threads: int) -> Callable[[], Any]:
    """Each call gives a new output. Idle threads do not spin, since they would disturb torch's threads."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kernel = list(weight.shape[2:])
    pads = [side // 2 for side in kernel]
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=kernel, pads=pads * 2, group=x.shape[1])
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(x: Tensor, weight: Tensor, threads: int) -> Callable[[], Any]:
    """The runtime shares input and output, so there is no copy: its best case."""
    import openvino
    from openvino import opset13

    data = opset13.parameter(list(x.shape), dtype=np.float32)
    pads = [side // 2 for side in weight.shape[2:]]
    y = opset13.group_convolution(data, weight[:, :, None].numpy(), [1, 1], pads, pads, [1, 1])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.compile_model(openvino.Model([y], [data]), "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]
