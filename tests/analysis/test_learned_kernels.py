"""Kernels whose profiles are known, and those of networks in every form."""

import copy

import pytest
import timm
import torch
from torch import nn

from replknet.analysis import plots
from replknet.analysis.learned_kernels import (
    LayerKernels,
    branch_agreement,
    distances,
    energy_within,
    layer_kernels,
    magnitude_by_distance,
    mean_magnitude,
    small_share,
)
from replknet.nn import DepthwiseConv2d, ReparamLargeKernelConv, merge
from replknet.nn.conv_bn import ConvBN


def trained(module):
    """The module with norms as after some training: no scale is 1, and some are negative."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def with_branches(large, small):
    return LayerKernels("layer", "two branches", large + small, large, small, 3)


def delta(side, channels=2):
    kernels = torch.zeros(channels, side, side, dtype=torch.float64)
    kernels[:, side // 2, side // 2] = torch.arange(1, channels + 1)
    return kernels


def test_all_of_a_delta_is_at_distance_zero():
    kernels = delta(7)
    assert magnitude_by_distance(kernels) == pytest.approx({0: 49, 1: 0, 2: 0, 3: 0})
    assert energy_within(kernels) == pytest.approx({1: 1, 3: 1, 5: 1, 7: 1})


def test_a_constant_kernel_is_one_everywhere_and_its_energy_an_area():
    kernels = torch.tensor([3.0, -0.01]).double()[:, None, None].expand(2, 5, 5)
    assert magnitude_by_distance(kernels) == pytest.approx({0: 1, 1: 1, 2: 1})
    assert energy_within(kernels) == pytest.approx({1: 1 / 25, 3: 9 / 25, 5: 1})


def test_rings_are_squares_and_an_even_kernel_has_its_centre_between_pixels():
    assert distances(3, 5).tolist() == [[2, 1, 1, 1, 2], [2, 1, 0, 1, 2], [2, 1, 1, 1, 2]]
    kernels = torch.ones(1, 4, 4, dtype=torch.float64)
    assert magnitude_by_distance(kernels) == {0.5: 1, 1.5: 1}
    assert energy_within(kernels) == {2: 0.25, 4: 1}


def test_every_channel_counts_alike_whatever_its_scale():
    kernels = torch.randn(6, 7, 7, dtype=torch.float64)
    scaled = kernels * torch.logspace(-9, 9, 6, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(mean_magnitude(scaled), mean_magnitude(kernels))
    assert energy_within(scaled) == pytest.approx(energy_within(kernels))
    assert mean_magnitude(kernels).mean().item() == pytest.approx(1)


def test_channels_of_zeros_are_left_out():
    kernels = torch.randn(3, 5, 5, dtype=torch.float64)
    some = torch.cat([kernels, torch.zeros(2, 5, 5, dtype=torch.float64)])
    assert magnitude_by_distance(some) == magnitude_by_distance(kernels)
    assert energy_within(some) == energy_within(kernels)
    zeros = torch.zeros_like(kernels)
    assert set(magnitude_by_distance(zeros).values()) == set(energy_within(zeros).values()) == {0.0}
    assert small_share(with_branches(zeros, zeros)) is None
    assert branch_agreement(with_branches(kernels, zeros)) is None


def test_what_the_small_branch_added():
    small = delta(5)
    large = 0.5 * delta(5)
    large[:, 0, 0] = torch.tensor([2.0, 4.0])
    layer = with_branches(large, small)
    # of the merged kernel, 1.5 in the centre and 2 in a corner
    assert small_share(layer) == pytest.approx(1 / 2.5)
    assert small_share(layer, 3) == pytest.approx(1 / 1.5)
    assert branch_agreement(layer) == pytest.approx(1)
    assert branch_agreement(with_branches(large, -small)) == pytest.approx(-1)
    # in units of the merged kernel, so that the parts add up where they have one sign
    parts = [mean_magnitude(part, layer.merged) for part in (large, small)]
    torch.testing.assert_close(sum(parts), mean_magnitude(layer.merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_are_what_merging_gives(dtype):
    model = trained(timm.create_model("replknet_test").to(dtype))
    before = copy.deepcopy(model.state_dict())
    layers = layer_kernels(model)
    assert [layer.sides for layer in layers] == [(9, 9), (7, 7), (5, 5), (5, 5), (5, 5)]
    merged = merge(model)
    for layer in layers:
        assert (layer.form, layer.small_side) == ("two branches", 5)
        assert torch.equal(layer.large + layer.small, layer.merged)
        applied = merged.get_submodule(layer.name).lkb_reparam.weight[:, 0]
        assert torch.equal(layer.merged.to(dtype), applied)
        margin = (layer.sides[0] - 5) // 2
        inner = layer.small[:, margin : margin + 5, margin : margin + 5]
        assert inner.count_nonzero() == layer.small.count_nonzero() > 0
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("fold_bn", [True, False])
def test_a_merged_network_no_longer_knows_its_small_branch(fold_bn):
    model = trained(timm.create_model("replknet_test"))
    merged = layer_kernels(merge(model, fold_bn))
    for layer, before in zip(merged, layer_kernels(model), strict=True):
        assert (layer.name, layer.form) == (before.name, "merged")
        assert layer.large is layer.small is layer.small_side is None
        assert small_share(layer) is branch_agreement(layer) is None
        torch.testing.assert_close(layer.merged, before.merged, rtol=1e-6, atol=0)


def test_a_kernel_without_a_small_branch_is_another_form():
    (layer,) = layer_kernels(trained(ReparamLargeKernelConv(4, 9)))
    assert (layer.form, layer.small, layer.channels) == ("one branch", None, 4)


def test_the_norm_of_our_own_convolution_is_folded():
    layer = trained(ConvBN(4, 4, 5, depthwise=True))
    (found,) = layer_kernels(nn.Sequential(nn.Conv2d(1, 4, 5), layer))
    assert (found.name, found.form) == ("1.conv", "convolution")
    scale = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
    torch.testing.assert_close(found.merged.float(), layer.conv.weight[:, 0] * scale[:, None, None])


def test_a_network_of_timm_works():
    model = timm.create_model("test_convnext")
    layers = layer_kernels(model)
    assert {layer.sides for layer in layers} == {(7, 7)}
    assert all(name.endswith("conv_dw") for name in (layer.name for layer in layers))
    assert torch.equal(layers[0].merged, model.get_submodule(layers[0].name).weight[:, 0].double())


def test_the_larger_side_of_a_strip_counts():
    strips = nn.Sequential(nn.Conv2d(4, 4, (1, 11), groups=4), DepthwiseConv2d(4, 3))
    (layer,) = layer_kernels(strips, min_side=11)
    assert layer.sides == (1, 11)
    assert list(energy_within(layer.merged)) == [1, 3, 5, 7, 9, 11]
    assert len(layer_kernels(strips, min_side=1)) == 2


def test_errors_say_what_there_is():
    with pytest.raises(ValueError, match="DepthwiseConv2d has no depthwise kernel of 5 pixels or more, the largest h"):
        layer_kernels(DepthwiseConv2d(4, 3))
    with pytest.raises(ValueError, match="Linear has no depthwise convolution"):
        layer_kernels(nn.Linear(3, 3))
    conv = DepthwiseConv2d(4, 5)
    nn.init.constant_(conv.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the kernels of 0 must be finite"):
        layer_kernels(nn.Sequential(conv))
    without = ReparamLargeKernelConv(4, 5, norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    with pytest.raises(ValueError, match="no running statistics"):
        layer_kernels(without)


def test_pictures_of_branches_strips_zeros_and_many_layers():
    branches = layer_kernels(timm.create_model("replknet_test"))
    text = _texts(plots.kernels(branches, "test"))
    assert "stages.0.blocks.0.large_kernel  9x9, 8 channels" in text
    assert {"merged", "large branch", "small branch"} <= set(text)
    assert "evenly" not in text[0]
    zeros = [LayerKernels("zeros", "convolution", torch.zeros(2, 1, 11, dtype=torch.float64))]
    assert "zeros  1x11, 2 channels" in _texts(plots.kernels(zeros, "test"))
    many = [LayerKernels(str(i), "merged", torch.ones(1, 5, 5, dtype=torch.float64)) for i in range(20)]
    text = _texts(plots.kernels(many, "test"))
    assert text[0].endswith("8 of 20 layers, evenly chosen")
    assert [name.split()[0] for name in text if "5x5" in name] == ["0", "3", "5", "8", "11", "14", "16", "19"]


def _texts(figure):
    """The title of a picture and what stands at and in its axes."""
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        texts += [text.get_text() for text in axis.texts]
        legend = axis.get_legend()
        texts += [] if legend is None else [text.get_text() for text in legend.texts]
    # drawn in full, and closed
    assert plots.as_html(figure, "kernels").startswith("<img")
    return texts
