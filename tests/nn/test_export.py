"""Exported files run without this package: on every road the operator is a plain convolution.

One test a road, on the list of the graph's nodes. `fx` keeps the operator as one leaf, since its graphs run here.
"""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from replknet.nn import DepthwiseConv2d

# two roads are torch's deprecated ones, tested because people still take them
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def network():
    return nn.Sequential(DepthwiseConv2d(4, 7), nn.ReLU(), DepthwiseConv2d(4, (3, 5), bias=False)).eval()


X = torch.randn(1, 4, 9, 10, generator=torch.Generator().manual_seed(0))


def onnx_of(model, **kwargs):
    import onnx

    file = io.BytesIO()
    exported = torch.onnx.export(model, (X,), file if not kwargs.get("dynamo") else None, **kwargs)
    return exported.model_proto if kwargs.get("dynamo") else onnx.load_model_from_string(file.getvalue())


def test_torch_export():
    model = network()
    program = torch.export.export(model, (X,))
    nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert nodes == ["aten.conv2d.default", "aten.relu.default", "aten.conv2d.default"]
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_onnx(dynamo):
    import onnxruntime

    model = network()
    proto = onnx_of(model, dynamo=dynamo)
    assert [node.op_type for node in proto.graph.node if node.op_type != "Constant"] == ["Conv", "Relu", "Conv"]
    assert {opset.domain for opset in proto.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    np.testing.assert_allclose(found, model(X).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_program_may_meet_the_operator_first_inside_an_export():
    # the first use of its name imports it, and tensors have no memory then
    program = """
import torch, replknet

class Net(torch.nn.Module):
    def forward(self, x, weight):
        return replknet.ops.depthwise_conv2d(x, weight)

x, weight = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3)
program = torch.export.export(Net(), (x, weight))
print([node.target for node in program.graph.nodes if node.op == "call_function"])
print(Net()(x, weight).max().item())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["[<OpOverload(op='aten.conv2d', overload='default')>]", "9.0"], result.stderr


def test_openvino():
    import openvino

    model = network()
    converted = openvino.convert_model(model, example_input=X)
    kinds = [op.get_type_name() for op in converted.get_ops()]
    assert kinds.count("GroupConvolution") == 2
    assert not [kind for kind in kinds if "replknet" in kind.lower() or "Framework" in kind]
    # on a processor with bfloat16 OpenVINO would compute in that
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(X.numpy())[0]
    np.testing.assert_allclose(found, model(X).detach().numpy(), rtol=1e-3, atol=1e-4)


def graph_kinds(graph):
    return [node.kind() for node in graph.nodes() if "conv" in node.kind() or "replknet" in node.kind()]


def test_trace():
    model = network()
    traced = torch.jit.trace(model, X)
    assert graph_kinds(traced.inlined_graph) == ["aten::_convolution", "aten::_convolution"]
    torch.testing.assert_close(traced(X), model(X))


def test_script():
    model = network()
    scripted = torch.jit.script(model)
    assert graph_kinds(scripted.inlined_graph) == ["aten::conv2d", "aten::conv2d"]
    torch.testing.assert_close(scripted(X), model(X))


def test_fx_keeps_the_operator_as_a_leaf():
    model = network()
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    names = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert names == ["depthwise", "depthwise"]
    torch.testing.assert_close(traced(X), model(X))
