"""Warming a GPU up: all that a first step would compile and time. The device is made up."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import replknet
from made import PATCH, SUMS, TORCH, made_device
from replknet import kernels
from replknet.kernels import measured
from replknet.kernels.triton_choice import Choice
from replknet.nn import DepthwiseConv2d


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Takes all calls on a CPU, as a CUDA device by default would."""
    choice = Choice(measured=True)
    backend = replace(measured.BACKEND, refusal=lambda call: None, forward=choice.forward, backward=choice.backward)
    monkeypatch.setattr(kernels, "BACKENDS", (backend,))
    # the function of that name hides the module
    monkeypatch.setattr(sys.modules["replknet.nn.warm"], "MEASURED", choice)
    return made_device(monkeypatch, tmp_path / "ways.json", {PATCH: 1.0, SUMS: 2.0, TORCH: 9.0})


def model():
    torch.manual_seed(0)
    return nn.Sequential(DepthwiseConv2d(3, 13), nn.BatchNorm2d(3), nn.Dropout(0.5), DepthwiseConv2d(3, 5)).bfloat16()


X = torch.randn(2, 3, 20, 21).bfloat16()


def test_a_training_step_is_warmed_and_the_model_stays_as_it_was(device):
    trained = model().train()
    for p in trained.parameters():
        p.grad = torch.randn_like(p)
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in trained.named_parameters()}
    random = torch.get_rng_state()
    found = replknet.warm(trained, X)
    assert {way.kind.split()[0] for way in found.ways} == {"forward", "dx", "dw"}
    # two kernels, each forward and for the weights; no gradient goes to the images
    assert len(found.ways) == 5
    assert all((way.tile, way.ms, way.torch_ms) == (str(PATCH), 1.0, 9.0) for way in found.ways)
    assert sorted(map(str, device.built)) == sorted(map(str, [PATCH, SUMS] * 5 + [SUMS] * 5))
    for name, t in trained.state_dict().items():
        assert torch.equal(t, before[name]), name
    for name, p in trained.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    # the first step has nothing left to time
    device.timed.clear()
    trained(X).sum().backward()
    assert device.timed == []
    assert TORCH not in device.ran[-4:]


def test_evaluation_is_warmed_forward_alone(device):
    found = replknet.warm(model().eval(), (X,))
    assert {way.kind.split()[0] for way in found.ways} == {"forward"}
    lines = str(found).splitlines()
    assert lines[0].startswith("2 kinds of calls in ")
    assert lines[1].split()[:3] == ["1.000", "9.000", "forward"]
    assert found.asdict()["ways"][0]["torch_ms"] == 9.0


def test_keyword_arguments_and_outputs_of_any_form_are_taken(device):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DepthwiseConv2d(3, 13).bfloat16()

        def forward(self, *, images):
            return {"loss": [self.layer(images).mean()], "count": 1}

    found = replknet.warm(Detector(), {"images": X})
    assert {way.kind.split()[0] for way in found.ways} == {"forward", "dw"}


def test_where_nothing_may_be_timed_the_priors_kernels_are_compiled(device):
    device.timing = False
    found = replknet.warm(model().eval().requires_grad_(False), X)
    assert device.built == [PATCH]
    assert [(way.tile, way.ms) for way in found.ways] == [(None, None)] * 2


def test_a_model_without_gradients_cannot_be_warmed_backward(device):
    with pytest.raises(ValueError, match="no output of the model has a gradient; backward=False"):
        replknet.warm(nn.Flatten(), X, backward=True)


def test_on_a_cpu_there_is_nothing_to_do():
    found = replknet.warm(model().eval(), X)
    assert found.ways == []
    assert str(found) == "nothing to do: no call of the operator went to a CUDA device"
