"""MobileNetV2 of the paper's ablations: the original's sizes and values, its variants, merged, saved and trained."""

import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import replknet
from matrix import FULL
from replknet.difference import largest_difference
from replknet.models import CheckpointError, Description, MobileNetV2Config, load_model, save_model
from replknet.tasks.classification.recipes import cifar10
from replknet.tasks.training import fit

VARIANTS = {
    "3x3": {},
    "13x13 without shortcuts": {"kernels": (13,) * 7, "shortcut": False},
    "9x9 with 3x3": {"kernels": (9,) * 7, "small_kernel": 3},
    "the last stage": {"kernels": (3,) * 6 + (7,), "small_kernel": 3, "width": 0.5},
    "dilated": {"dilation": 4, "stem_stride": 1, "strides": (1, 1, 2, 2, 1, 2, 1)},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
# one with all that a variant can have, and in the full matrix the others
large_and_small = pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "9x9 with 3x3" else [FULL])
        for name, options in VARIANTS.items()
    ],
)


def small(**options):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_lk", num_classes=10, **{"width": 0.25, **options})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def test_with_the_originals_kernels_it_is_timms_network():
    theirs = timm.create_model("mobilenetv2_100").eval()
    ours = timm.create_model("mobilenetv2_lk").eval()
    values = list(theirs.state_dict().values())
    own = ours.state_dict()
    assert [v.shape for v in values] == [v.shape for v in own.values()]
    ours.load_state_dict(dict(zip(own, values, strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_larger_kernels_cost_their_area():
    def parameters(**options):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model("mobilenetv2_lk", **options).parameters())

    # 7,136 channels of depthwise kernels
    assert parameters(kernels=(9,) * 7) - parameters() == 7136 * (81 - 9)
    assert parameters(kernels=(9,) * 7, small_kernel=3) - parameters(kernels=(9,) * 7) == 7136 * (9 + 2)
    # the paper's last-stage table prints 2.64, 2.67, 2.69 and 2.75 M, which is a width of 0.75
    found = [parameters(kernels=(3,) * 6 + (side,), width=0.75) / 1e6 for side in (3, 7, 9, 13)]
    assert found == pytest.approx([2.64, 2.67, 2.69, 2.75], abs=0.005)


@variants
def test_merged_it_gives_the_same(options):
    model = small(**options)
    merged = replknet.merge(model)
    assert replknet.nn.unfolded_norms(merged) == []
    x = torch.randn(2, 3, 45, 64)
    with torch.inference_mode():
        _, relative = largest_difference(model(x), merged(x))
        _, exact = largest_difference(model.double()(x.double()), replknet.merge(model)(x.double()))
    assert relative < 2e-5
    assert exact < 1e-10


@large_and_small
def test_saved_it_comes_back_in_its_form(options, tmp_path):
    model = small(**options)
    config = MobileNetV2Config(**{"width": 0.25, **options})
    x = torch.randn(1, 3, 32, 32)
    for form in (model, replknet.merge(model, fold_bn=False), replknet.merge(model)):
        save_model(form, tmp_path / "m.safetensors", Description(config=config, num_classes=10, image_size=32))
        loaded, description = load_model(tmp_path / "m.safetensors")
        assert description.config == config
        own, theirs = form.state_dict(), loaded.state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x), form(x))


def test_a_file_of_an_unknown_family_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "m.safetensors"
    save_model(small(), file, Description(config=MobileNetV2Config(width=0.25), num_classes=10))
    save_file(load_file(file), file, metadata={"replknet": json.dumps({"family": "resnet", "config": {}})})
    with pytest.raises(CheckpointError, match=r"no family is called .resnet.; there are replknet, mobilenetv2"):
        load_model(file)


def test_shortcuts_are_where_the_shape_stays():
    def count(model):
        return sum(block.shortcut for stage in model.stages for block in stage.blocks)

    assert count(small(width=1.0)) == 10
    assert count(small(shortcut=False)) == 0


def test_small_kernels_stand_beside_larger_ones_only():
    model = small(kernels=(3, 3, 3, 3, 5, 5, 5), small_kernel=3)
    branches = [stage.blocks[0].large_kernel.small_conv is not None for stage in model.stages]
    assert branches == [False] * 4 + [True] * 3


def test_the_protocol_of_a_timm_model():
    model = small(drop_path_rate=0.1)
    x = torch.randn(2, 3, 64, 64)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    assert model.forward_head(final, pre_logits=True).shape == (2, model.head_hidden_size)
    assert len(features) == 7
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    groups = create_optimizer_v2(small(), "adamw", lr=1.0, layer_decay=0.5).param_groups
    # the stem, 17 blocks, and what follows
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**i for i in range(18, -1, -1)]


def test_features_leave_out_what_they_do_not_need():
    whole = small()
    features = timm.create_model("mobilenetv2_lk", features_only=True, width=0.25, out_indices=(1, 4)).eval()
    features.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    expected = whole.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))
    assert [64 // f.shape[-1] for f in expected] == features.feature_info.reduction() == [4, 16]
    assert not any("head" in key or "stages.5" in key for key in features.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@large_and_small
def test_it_scripts(options):
    model = small(**options)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": (3, 3)}, r"kernels must have one value for each of the 7 stages, got \(3, 3\)"),
        ({"kernels": (4,) * 7}, "kernel sides must be odd, got 4"),
        ({"strides": (0,) * 7}, "strides and dilation must be at least 1"),
        ({"width": 0.0}, "the width positive"),
    ],
)
def test_configuration_errors(change, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2Config(**change)


def test_a_small_kernel_beside_a_dilated_one_is_an_error():
    with pytest.raises(ValueError, match="a small kernel cannot merge into a kernel of dilation 2, whose taps"):
        timm.create_model("mobilenetv2_lk", kernels=(5,) * 7, small_kernel=3, dilation=2)
    with pytest.raises(RuntimeError, match="no weights were released for mobilenetv2_lk"):
        timm.create_model("mobilenetv2_lk", pretrained=True)


def test_a_recipe_trains_it(cifar, tmp_path):
    recipe = cifar10().changed(
        model="mobilenetv2_lk", epochs=1, warmup_epochs=0, batch_size=40, optimizer="sgd", lr=0.1,
        kernels=(5,) * 7, network={"small_kernel": 3, "width": 0.25, "shortcut": False},
    )  # fmt: skip
    loaded, description = load_model(fit(recipe, tmp_path, cifar))
    assert description.config == MobileNetV2Config(kernels=(5,) * 7, small_kernel=3, width=0.25, shortcut=False)
    assert loaded(torch.randn(1, 3, 32, 32)).isfinite().all()
    # the average and the network beside it are scored
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["val_loss"] != row["val_loss_raw"]
    wrong = recipe.changed(network={"shortcuts": False})
    with pytest.raises(ValueError, match=r"mobilenetv2_lk cannot be built with .*'shortcuts'"):
        fit(wrong, tmp_path / "other", cifar)
