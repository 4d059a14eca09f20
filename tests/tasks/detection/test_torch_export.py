"""A merged segmentation network as a file for other runtimes, at any height and width."""

import numpy as np
import pytest
import timm
import torch

import replknet
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES = ((64, 96), (128, 64), (160, 224), (97, 251), (40, 512))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = UperNet(timm.create_model("replknet_test", features_only=True), 5, 16, 8)
    return without_auxiliary(replknet.merge(model)).eval()


def exported(network):
    # from 33 pixels on the last map has more than one
    side = {2: torch.export.Dim("height", min=33, max=4096), 3: torch.export.Dim("width", min=33, max=4096)}
    return torch.export.export(network, (torch.randn(1, 3, 64, 96),), dynamic_shapes=(side,))


@pytest.mark.full
def test_torch_export(network):
    program = exported(network).module()
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(program(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_onnx(network):
    import onnxruntime

    proto = torch.onnx.export(exported(network), dynamo=True).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-3, atol=1e-4)
