"""Costs of networks whose answers are known, and pictures."""

from torch import nn

from replknet.analysis import cost, plots


def test_cost_counts_a_convolution_and_leaves_the_network_alone():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    found = cost(conv, 10)
    assert (found.parameters, found.multiply_adds) == (224, 8 * 3 * 9 * 100)
    assert conv.weight.device.type == "cpu"


def test_pictures_are_self_contained():
    rows = [{"epoch": 0, "train_loss": 1.0, "val_top1": 0.5}]
    for figure in (
        plots.curves({"a": rows}),
        plots.confusion([[3, 1], [0, 4]], ["cat", "dog"]),
    ):
        assert plots.as_html(figure, "picture").startswith('<img alt="picture" src="data:image/png;base64,iVBOR')
