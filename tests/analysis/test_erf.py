"""Effective receptive fields of networks whose answers are known."""

import pytest
import timm
import torch
from torch import nn

from replknet.analysis import effective_receptive_field, plots
from replknet.analysis.erf import _side
from replknet.nn import merge


def ones(conv):
    nn.init.ones_(conv.weight)
    return conv


class Patches(nn.Module):
    """Tokens `[N,L,1]`: the sum of each patch of 4x4 pixels, after tokens that are the sum of the whole image."""

    def __init__(self, prefix=0):
        super().__init__()
        self.patches = ones(nn.Conv2d(1, 1, 4, 4, bias=False))
        self.prefix = prefix

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens.sum(1, keepdim=True)] * self.prefix + [tokens], 1)


def test_one_convolution_sees_its_kernel():
    conv = ones(nn.Conv2d(1, 1, 5, padding=2, bias=False))
    # more than 50 images are not needed (the official script saved only when a 51st was drawn)
    field = effective_receptive_field(conv, [torch.rand(1, 1, 21, 21)], features=conv)
    assert field.map[8:13, 8:13].eq(1).all()
    assert field.map.sum() == 25
    assert field.sides == {0.2: 3, 0.3: 3, 0.5: 5, 0.99: 5}
    assert field.areas[0.99] == 25 / 441
    assert field.log_map.max() == 1
    assert (field.images, field.skipped, field.scale) == (1, 0, "log")


def test_the_linear_scale_weighs_what_the_logarithm_flattens():
    conv = ones(nn.Conv2d(1, 1, 5, padding=2, bias=False))
    conv.weight.data[0, 0, 1:4, 1:4] = 99
    images = [torch.rand(1, 1, 21, 21)]
    log, linear = (effective_receptive_field(conv, images, conv, scale=scale) for scale in ("log", "linear"))
    assert torch.equal(log.map, linear.map)
    # 9 * log10(100) of that + 16 * log10(2), against 9 * 99 of that + 16
    assert log.curve()[0] == pytest.approx((9 / 441, 18 / (18 + 16 * 0.30103)))
    assert linear.curve()[0] == pytest.approx((9 / 441, 891 / 907))
    assert (log.sides[0.99], linear.sides[0.99]) == (5, 5)
    assert linear.scaled.max() == 1
    with pytest.raises(ValueError, match="scale must be one of log, linear, got 'sqrt'"):
        effective_receptive_field(conv, images, conv, scale="sqrt")


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
    assert _side(torch.ones(2, 2), 0.1) is None


def test_tokens_are_laid_out_on_their_grid():
    model = Patches()
    field = effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], features=model)
    assert field.map[4:8, 4:8].eq(1).all()
    assert field.map.sum() == 16
    # two rows of four: the proportions are those of the image
    field = effective_receptive_field(model, [torch.rand(1, 1, 8, 16)], features=model)
    assert field.map[4:8, 8:12].eq(1).all()
    assert field.map.sum() == 16


def test_the_grid_of_the_patches_comes_before_the_proportions():
    model = Patches()
    model.patch_embed = nn.Module()
    model.patch_embed.grid_size = (1, 9)
    field = effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], features=model)
    # the fifth token of nine, in either layout
    assert field.map[4:8, 4:8].eq(1).all()
    model.patch_embed.dynamic_feat_size = lambda size: (9, 1)
    # the row in the middle has the only column
    assert torch.equal(effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], model).map, field.map)
    # tokens that were merged since fill no such grid
    model.patch_embed.dynamic_feat_size = lambda size: (6, 6)
    assert torch.equal(effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], model).map, field.map)


def test_prefix_tokens_are_dropped():
    model = Patches(prefix=2)
    model.num_prefix_tokens = 2
    field = effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], features=model)
    assert field.map[4:8, 4:8].eq(1).all()
    assert field.map.sum() == 16
    model.num_prefix_tokens = 1
    with pytest.raises(
        ValueError, match=r"11 tokens, the first 1 of them dropped .* do not fill a grid of an image of"
    ):
        effective_receptive_field(model, [torch.rand(1, 1, 12, 12)], features=model)


def test_a_submodule_is_the_same_as_its_function_and_the_head_does_not_run():
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 5, 1, 2), nn.ReLU(inplace=True))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    # the head is for 8x8 pixels
    images = [torch.randn(2, 3, 32, 32)]
    named = effective_receptive_field(model, images, features="0")
    assert torch.equal(named.map, effective_receptive_field(model, images, features=body).map)
    # what follows in place does not change what was taken
    inner = effective_receptive_field(model, images, features="0.2")
    assert torch.equal(inner.map, effective_receptive_field(model, images, features=body[:3]).map)
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match=r"Sequential has no submodule '0.9'; did you mean 0.3, 0.2, 0.1"):
        effective_receptive_field(model, images, features="0.9")
    model.spare = nn.Identity()
    model.forward = lambda x: body(x)
    with pytest.raises(ValueError, match="spare is not called when Sequential runs"):
        effective_receptive_field(model, images, features="spare")


SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("test_resnet", {}, "layer4"),
        ("test_convnext", {}, "stages.3"),
        ("test_vit", {"img_size": 32}, "blocks.5"),
        ("swin_tiny_patch4_window7_224", SWIN, "layers.1"),
        ("replknet_test", {}, "stages.3"),
    ],
)
def test_the_default_is_the_last_stage_before_the_norm(name, options, last):
    model = timm.create_model(name, **options)
    images = [torch.randn(2, 3, 32, 32)]
    field = effective_receptive_field(model, images)
    assert field.map.shape == (32, 32)
    # tokens with a class token before them, and [N,h,w,C], are among these
    torch.testing.assert_close(effective_receptive_field(model, images, features=last).map, field.map)


def test_channels_at_the_end_are_not_taken_for_columns():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"\[1, 9, 9, 8\] for images \[1, 3, 9, 9\] looks like \[N,h,w,C\]"):
        effective_receptive_field(conv, [torch.rand(1, 3, 9, 9)], lambda x: conv(x).permute(0, 2, 3, 1))


def test_merging_does_not_change_the_field():
    torch.manual_seed(0)
    model = timm.create_model("replknet_test")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = [torch.randn(2, 3, 64, 64)]
    whole, merged = (effective_receptive_field(m, images) for m in (model, merge(model.eval())))
    torch.testing.assert_close(merged.map, whole.map, rtol=1e-3, atol=1e-6 * whole.map.max().item())
    assert merged.sides == whole.sides


def test_modes_and_gradients_are_as_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    seen = []

    def features(x):
        seen.append((model.training, any(p.requires_grad for p in model.parameters())))
        return model(x)

    def failing(x):
        raise RuntimeError("the reason")

    statistics = model[1].running_mean.clone()
    images = [torch.rand(1, 3, 8, 8)]
    with torch.no_grad():
        effective_receptive_field(model, images, features)
    with pytest.raises(RuntimeError, match="the reason"):
        effective_receptive_field(model, images, failing)
    assert seen == [(False, False)]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.equal(model[1].running_mean, statistics)


def test_images_without_finite_gradients_are_left_out_and_counted():
    conv = ones(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    images = torch.rand(3, 1, 9, 9) + 1
    images[1] = torch.nan
    field = effective_receptive_field(conv, [images], features=lambda x: conv(x) * x.mean((1, 2, 3), keepdim=True))
    alone = effective_receptive_field(conv, [images[::2]], features=lambda x: conv(x) * x.mean((1, 2, 3), keepdim=True))
    assert (field.images, field.skipped) == (2, 1)
    assert torch.equal(field.map, alone.map)
    with pytest.raises(ValueError, match=r"all images are zero \(0\) or not finite \(1\)"):
        effective_receptive_field(conv, [images[1:2]], features=lambda x: conv(x) * x)


def test_the_curve_ends_with_everything():
    conv = ones(nn.Conv2d(1, 1, 5, padding=2, bias=False))
    field = effective_receptive_field(conv, [torch.rand(1, 1, 9, 9)], features=conv)
    assert field.curve() == [(9 / 81, 9 / 25), (25 / 81, 1), (49 / 81, 1), (1, 1)]
    assert field.curve(points=2) == [(9 / 81, 9 / 25), (1, 1)]
    with pytest.raises(ValueError, match="points must be 2 or more, got 1"):
        field.curve(1)
    # an even side leaves a row and a column to the whole image, and a wide one has squares cut by its border
    for size in ((8, 8), (8, 12), (64, 64)):
        image = torch.rand(1, 1, *size)
        curve = effective_receptive_field(conv, [image], features=lambda x: conv(x) + x.mean()).curve()
        assert curve == sorted(curve)
        assert curve[-1] == (1, 1)
        assert len(curve) == max(size) // 2


def test_receptive_field_errors():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match="no images"):
        effective_receptive_field(conv, [], features=conv)
    with pytest.raises(ValueError, match="Conv2d has no forward_intermediates; pass features="):
        effective_receptive_field(conv, [])
    with pytest.raises(ValueError, match=r"images must have one size, got \[8, 8\] and \[9, 9\]"):
        effective_receptive_field(conv, [torch.rand(1, 1, 8, 8) + 9, torch.rand(1, 1, 9, 9)], features=lambda x: x)
    with pytest.raises(ValueError, match=r"all images are zero \(1\) or not finite \(0\): the network does not see"):
        effective_receptive_field(conv, [torch.rand(1, 1, 8, 8)], features=lambda x: 0 * x)
    with pytest.raises(ValueError, match="the feature map has no gradient: features must not detach it"):
        effective_receptive_field(conv, [torch.rand(1, 1, 8, 8)], features=lambda x: conv(x).detach())
    for features, got in ((lambda x: [x], "list"), (lambda x: x.mean((2, 3)), r"\[2, 1\]"), (lambda x: x[0], r"\[1,")):
        with pytest.raises(ValueError, match=rf"must be a map \[2,C,h,w\] or tokens \[2,L,C\], got {got}"):
            effective_receptive_field(conv, [torch.rand(2, 1, 8, 8)], features)


def test_several_fields_share_one_picture():
    conv = nn.Conv2d(1, 1, 5, padding=2)
    field = effective_receptive_field(conv, [torch.rand(1, 1, 21, 21) + 1], features=lambda x: conv(x) + x)
    for count in (1, 3, 5):
        figure = plots.receptive_fields({f"network {i}": field for i in range(count)})
        shown = [axis for axis in figure.get_axes() if axis.images]
        assert [axis.images[0].get_clim() for axis in shown] == [(0, 1)] * count
        (curves,) = (axis for axis in figure.get_axes() if axis.get_lines())
        assert [line.get_label() for line in curves.get_lines()] == [f"network {i}" for i in range(count)]
        assert plots.as_html(figure, "picture").startswith('<img alt="picture" src="data:image/png;base64,iVBOR')
