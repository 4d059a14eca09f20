"""Quantizers: how each runtime gets a network in int8, and the settings that stop its own changes to the network."""

import io
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from replknet.deploy.verify import Run

Target = Literal["onnx", "openvino"]
# writes a file in int8; arguments: names of layers that stay in float32, and the path
Quantizer = Callable[[Collection[str], Path], None]


def loaded(path: Path, threads: int) -> Run:
    """Runs an .onnx or .xml file on the CPU with this number of threads; idle threads do not spin."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # spinning threads would slow down the other files that are timed in turns
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(output) for output in session.run(None, {"image": x.numpy()})]
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        # for layers that are not in int8; else some processors compute them in bfloat16
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.compile_model(path, "CPU", settings)
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


def layers(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and weights of the layers that can be in int8: convolutions and linear layers."""
    return [
        (name, module.weight.detach())
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]


def _nodes(network: nn.Module, weights: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Layer -> node of a file. Equal weights identify the pairs, since not every format keeps names.

    Args:
        network: the merged network.
        weights: node -> weight of the node.
    """
    left = dict(weights)
    found = {}
    for name, weight in layers(network):
        values = weight.flatten().numpy()
        node = next((node for node, w in left.items() if w.size == values.size and np.array_equal(w.ravel(), values)))
        del left[node]
        found[name] = node
    return found


def _onnx_quantizer(source: Path, network: nn.Module, calibration: Sequence[Tensor], per_channel: bool) -> Quantizer:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self._batches, None)
            return None if x is None else {"image": x.numpy()}

    prepared, cache = source.with_name("prepared.onnx"), source.with_name("ranges.json")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = _nodes(
        network,
        {
            node.name: onnx.numpy_helper.to_array(tensors[node.input[1]])
            for node in graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in tensors
        },
    )

    def quantize(float_layers: Collection[str], path: Path) -> None:
        left = {nodes[name]: network.get_submodule(name) for name in float_layers}
        quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=per_channel,
            # with signed activations ONNX Runtime was slower than in float32, measured on a processor with VNNI
            activation_type=QuantType.QUInt8,
            # with Relu and Clip in the list, ReLU and ReLU6 become part of the rounding
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Relu", "Clip"],
            nodes_to_exclude=list(left),
            # the cache keeps the ranges, so that the images run only for the first file
            calibration_cache_path=cache,
        )
        model = onnx.load(path)
        _keep_in_float(model.graph, left)
        onnx.save(model, path)

    return quantize


def _keep_in_float(graph: Any, left: Mapping[str, nn.Module]) -> None:
    """Dequantize the inputs of these nodes with one scale for each channel; all these scales are equal.

    This keeps their weights in float32. When ONNX Runtime loads a file, its optimizer WeightBiasQuantization rounds
    weights to int8 with one scale for all channels. It does so for each convolution with a quantized output and an
    input with a single scale.

    Args:
        graph: graph of a file that quantize_static wrote; it is changed in place.
        left: node that stays in float32 -> its layer in torch.
    """
    from onnx import helper, numpy_helper

    makers = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    for place, node in reversed(list(enumerate(graph.node))):
        maker = makers.get(node.input[0]) if node.name in left else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        layer = left[node.name]
        channels = int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)  # type: ignore[arg-type]  # a number
        inputs = [maker.input[0]]
        for name in maker.input[1:]:
            repeated = np.repeat(numpy_helper.to_array(values[name]).ravel(), channels)
            inputs.append(f"{node.name}.{name}")
            graph.initializer.append(numpy_helper.from_array(repeated, inputs[-1]))
        output = f"{node.name}.input"
        graph.node.insert(place, helper.make_node("DequantizeLinear", inputs, [output], axis=1))
        node.input[0] = output


def _openvino_quantizer(
    source: Path, network: nn.Module, calibration: Sequence[Tensor], per_channel: bool
) -> Quantizer:
    # switches off NNCF's reports of its use
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    nncf.set_log_level(logging.ERROR)
    nodes = _nodes(
        network,
        {
            node.get_friendly_name(): node.input_value(1).get_node().data
            for node in openvino.Core().read_model(source).get_ordered_ops()
            if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        },
    )
    # single images: NNCF averages the smallest and largest values over its items
    images = [image[None].numpy() for batch in calibration for image in batch]
    weights = QuantizationParameters(per_channel=per_channel)

    def quantize(float_layers: Collection[str], path: Path) -> None:
        ignored = nncf.IgnoredScope(
            names=[nodes[name] for name in float_layers], types=["Add", "Multiply", "ReduceMean"], validate=False
        )
        # hides the progress bars of NNCF
        with redirect_stdout(io.StringIO()):
            quantized = nncf.quantize(
                openvino.Core().read_model(source),
                nncf.Dataset(images),
                subset_size=len(images),
                ignored_scope=ignored,
                advanced_parameters=AdvancedQuantizationParameters(weights_quantization_params=weights),
            )
        openvino.save_model(quantized, path, compress_to_fp16=False)

    return quantize


QUANTIZERS: dict[Target, Callable[[Path, nn.Module, Sequence[Tensor], bool], Quantizer]] = {
    "onnx": _onnx_quantizer,
    "openvino": _openvino_quantizer,
}
