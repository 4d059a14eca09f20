"""The rules by type: open to other networks, inherited by subclasses, and free of optional packages."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from replknet.deploy import optimize
from replknet.deploy.inference_layers import Convolution, Pointwise
from replknet.deploy.rewrite import Rewriter, fold, rewritten
from replknet.nn import RepLKBlock


class Scaled(nn.Module):
    """A block that no rule of the package knows: a 1x1 convolution, then a factor."""

    def __init__(self):
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 1), 2.0

    def forward(self, x):
        return self.conv(x) * self.factor


class ScaledMore(Scaled):
    """A block without a rule of its own."""


class Padded(nn.Conv2d):
    """A convolution that computes something else than its class."""

    def forward(self, x):
        return super().forward(x) + 1


def test_another_network_registers_its_own_rules():
    @fold.register
    def factor_into_weights(block: Scaled) -> None:
        for parameter in block.conv.parameters():
            parameter.mul_(block.factor)
        block.factor = 1.0

    @rewritten.register
    def without_factor(block: Scaled, rewriter: Rewriter) -> nn.Module:
        return rewriter.convolution(block.conv, None)

    for kind in (Scaled, ScaledMore):
        model, x = nn.Sequential(kind(), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
        optimized = optimize(model, x)
        assert isinstance(optimized.network[0], Pointwise)
        assert optimized.report.products == 1
        torch.testing.assert_close(optimized(x), model(x))
    # a module without a rule keeps its own forward
    assert isinstance(optimized.network, nn.Sequential)


def test_a_subclass_of_a_convolution_keeps_its_own_forward():
    model, x = nn.Sequential(Padded(3, 4, 1), nn.Conv2d(4, 4, 3)), torch.randn(1, 3, 8, 8)
    optimized = optimize(model, x)
    assert [type(layer) for layer in optimized.network] == [Padded, Convolution]
    torch.testing.assert_close(optimized(x), model(x))


@torch.no_grad()
def test_a_block_whose_norm_stays_keeps_its_own_forward():
    # a norm without running statistics takes those of the batch, and cannot be folded
    block, x = RepLKBlock(8, 8, 5, None), torch.randn(2, 8, 8, 8)
    block.prelkb_bn = nn.BatchNorm2d(8, track_running_stats=False)
    optimized = optimize(block.eval(), x)
    assert isinstance(optimized.network, RepLKBlock)
    assert isinstance(optimized.network.pw1, Pointwise)
    assert optimized.report.unfolded == ("prelkb_bn",)
    torch.testing.assert_close(optimized(x), block(x), rtol=1e-4, atol=1e-5)


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # an import of it raises ImportError
import timm, torch
import replknet
from replknet.deploy import optimize
model = timm.create_model("replknet_test", num_classes=3).eval()
print(optimize(model, torch.randn(1, 3, 64, 64)).report.products)
print([name for name in sys.modules if name.startswith("replknet.tasks")])
"""


@pytest.mark.full
def test_a_classifier_is_optimized_without_the_packages_of_segmentation():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == ["24", "[]"], run.stderr
