"""Receptive fields and costs on networks whose answers are known."""

import pytest
import timm
import torch
from torch import nn

from replknet.analysis import cost, effective_receptive_field, plots
from replknet.analysis.erf import _side


def test_one_convolution_sees_its_kernel():
    conv = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    nn.init.ones_(conv.weight)
    # more than 50 images are not needed (the official script saved only when a 51st was drawn)
    field = effective_receptive_field(conv, [torch.rand(1, 1, 21, 21)], features=conv)
    assert field.map[8:13, 8:13].eq(1).all()
    assert field.map.sum() == 25
    assert field.sides == {0.2: 3, 0.3: 3, 0.5: 5, 0.99: 5}
    assert field.areas[0.99] == 25 / 441
    assert field.log_map.max() == 1


def test_batches_give_the_mean_and_wider_kernels_see_more():
    images = torch.randn(4, 3, 64, 64)
    fields = []
    for kernels in ((3, 3, 3, 3), (15, 13, 7, 3)):
        torch.manual_seed(0)
        model = timm.create_model("replknet_cifar", kernels=kernels, small_kernel=None)
        one, many = (effective_receptive_field(model, images.split(n)) for n in (4, 1))
        torch.testing.assert_close(one.map, many.map)
        assert one.images == many.images == 4
        fields.append(one)
    assert fields[1].areas[0.5] > fields[0].areas[0.5]


def test_a_share_that_is_not_reached_is_none():
    # official code: the search returned None and its caller failed on unpacking it
    assert _side(torch.ones(9, 9), 0.99) is None
    assert _side(torch.ones(9, 9), 0.1) == 3


def test_receptive_field_errors():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match="no images"):
        effective_receptive_field(conv, [], features=conv)
    with pytest.raises(ValueError, match="Conv2d has no forward_intermediates; pass features="):
        effective_receptive_field(conv, [])
    with pytest.raises(ValueError, match=r"images must have one size, got \[8, 8\] and \[9, 9\]"):
        effective_receptive_field(conv, [torch.rand(1, 1, 8, 8) + 9, torch.rand(1, 1, 9, 9)], features=lambda x: x)
    with pytest.raises(ValueError, match="zero or not finite everywhere"):
        effective_receptive_field(conv, [torch.rand(1, 1, 8, 8)], features=lambda x: 0 * x)


def test_cost_counts_a_convolution_and_leaves_the_network_alone():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    found = cost(conv, 10)
    assert (found.parameters, found.multiply_adds) == (224, 8 * 3 * 9 * 100)
    assert conv.weight.device.type == "cpu"


def test_pictures_are_self_contained():
    conv = nn.Conv2d(1, 1, 5, padding=2)
    field = effective_receptive_field(conv, [torch.rand(1, 1, 21, 21) + 1], features=lambda x: conv(x) + x)
    rows = [{"epoch": 0, "train_loss": 1.0, "val_top1": 0.5}]
    for figure in (
        plots.receptive_fields({"a": field}),
        plots.curves({"a": rows}),
        plots.confusion([[3, 1], [0, 4]], ["cat", "dog"]),
    ):
        assert plots.as_html(figure, "picture").startswith('<img alt="picture" src="data:image/png;base64,iVBOR')
