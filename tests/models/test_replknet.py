"""The networks: official sizes, timm's protocol as timm's own tests ask for it, and configuration errors."""

import copy

import pytest
import timm
import torch
from timm.models import is_model_in_modules
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import replknet
from matrix import FULL, matrix
from replknet.models import CONFIGS, RepLKNet, RepLKNetConfig

NAMES = list(CONFIGS)
SMALL = ["replknet_nano", "replknet_cifar", "replknet_cifar_l", "replknet_test"]

# training, branches merged, norms folded as well: parameters and (for the first two) state-dict entries
SIZES = {
    "replknet_31b": (79_864_168, 1171, 79_527_272, 931, 79_390_824),
    "replknet_31l": (172_671_016, 1171, 172_165_672, 931, 171_961_000),
    "replknet_xl": (335_435_752, 1027, 335_399_656, 931, 335_114_728),
}
# multiply-adds of the merged network at a size, in 10^9
COSTS = {("replknet_31b", 224): 15.354, ("replknet_31b", 384): 45.119, ("replknet_31l", 384): 95.989}
COSTS |= {("replknet_xl", 320): 128.730, ("replknet_b_k3", 224): 12.939, ("replknet_b_k7", 224): 13.063}
COSTS |= {("replknet_b_k13", 224): 13.436, ("replknet_b_k25", 224): 14.809}


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", matrix([(name,) for name in SIZES], [("replknet_31b",)]))
def test_parameters_and_entries_are_the_official_ones(name):
    model = meta(name)
    merged = replknet.merge(model, fold_bn=False)
    found = (parameters(model), len(model.state_dict()), parameters(merged), len(merged.state_dict()))
    assert (*found, parameters(replknet.merge(model))) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("replknet_b_k3", 71_894_376),
        ("replknet_b_k7", 72_375_656),
        ("replknet_b_k13", 73_819_496),
        ("replknet_b_k25", 78_372_200),
    ],
)
def test_parameters_of_the_kernel_size_study(name, merged):
    assert parameters(meta(name, small_kernel_merged=True)) == merged


@pytest.mark.parametrize(("name", "size"), matrix(COSTS, [("replknet_31b", 224), ("replknet_b_k13", 224)]))
def test_multiply_adds_are_the_papers(name, size):
    model = meta(name, small_kernel_merged=True).eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() / 2e9 == pytest.approx(COSTS[name, size], abs=6e-4)


def test_22k_classes():
    assert parameters(meta("replknet_31b", num_classes=21841)) == 101_226_193


def test_keys_of_31b_are_the_official_ones():
    keys = set(meta("replknet_31b").state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for layer in ("stem.0", "stem.3", "transitions.2.1", "stages.2.blocks.34.pw1", "stages.2.blocks.35.pw2"):
        assert keys >= {f"{layer}.conv.weight", *(f"{layer}.bn.{n}" for n in norm)}
    assert keys >= {f"stages.3.blocks.2.prelkb_bn.{n}" for n in norm} | {f"norm.{n}" for n in norm}
    assert keys >= {"stages.3.blocks.3.preffn_bn.weight", "head.weight", "head.bias"}
    shape = meta("replknet_31b").state_dict()["stages.0.blocks.2.large_kernel.lkb_origin.conv.weight"].shape
    assert list(shape) == [128, 1, 31, 31]
    assert {key.split(".")[0] for key in keys} == {"stem", "stages", "transitions", "norm", "head"}


def test_names_are_ours_and_registered():
    registered = timm.list_models("replknet_*")
    assert sorted(NAMES) == sorted(registered)
    assert all(is_model_in_modules(name, ["replknet"]) for name in NAMES)
    pretrained = timm.list_models("replknet_*", pretrained=True)
    assert len(pretrained) == 7


# ---- timm's own model tests, on small networks and small images


def images(model, n=1):
    return torch.randn(n, *[min(side, 64) for side in model.default_cfg["input_size"]])


@pytest.mark.parametrize("name", SMALL)
def test_timm_forward_and_default_cfg(name):
    model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    x = torch.randn(1, *cfg["input_size"])
    assert model.forward_features(x).shape[-2:] == cfg["pool_size"]
    assert model(x).shape == (1, cfg["num_classes"])
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape[-2:] == cfg["pool_size"]
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state


@pytest.mark.parametrize("name", SMALL)
def test_timm_every_parameter_gets_a_gradient(name):
    model = timm.create_model(name, num_classes=42).train()
    model(images(model, 2)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_timm_features(name):
    model = timm.create_model(name, features_only=True).eval()
    x = images(model)
    outputs = model(x)
    assert [o.shape[1] for o in outputs] == model.feature_info.channels() == list(CONFIGS[name].channels)
    assert [x.shape[-1] // o.shape[-1] for o in outputs] == model.feature_info.reduction()
    assert len(outputs) == len(CONFIGS[name].depths)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", matrix([(name,) for name in SMALL], [("replknet_test",)]))
def test_timm_torchscript(name):
    model = timm.create_model(name, scriptable=True).eval()
    x = images(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_timm_fx_forward_and_backward(name):
    from torch.fx import symbolic_trace

    model = timm.create_model(name).eval()
    traced = symbolic_trace(model)
    x = images(model)
    torch.testing.assert_close(traced(x), model(x))
    assert "depthwise" in {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
    traced(x).mean().backward()


def test_intermediates():
    model = timm.create_model("replknet_test").eval()
    x = images(model)
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(features) == 4
    two = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert torch.equal(two[0], features[0])
    assert torch.equal(two[1], features[2])
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], final)
    assert torch.equal(model.forward_head(final), model(x))
    assert model.forward_head(final, pre_logits=True).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("indices", [[], ()])
def test_no_stage_at_all_is_an_error(indices):
    # official code: `if self.out_indices:` took () for a classifier's None
    with pytest.raises(ValueError, match=r"indices must name at least one of the 4 stages, got .*None takes all"):
        timm.create_model("replknet_test").forward_intermediates(torch.zeros(1, 3, 64, 64), indices=indices)
    with pytest.raises(ValueError, match="indices must name at least one of the 4 stages, got"):
        timm.create_model("replknet_test", features_only=True, out_indices=indices)


def test_every_depthwise_convolution_of_stride_1_runs_on_the_operator():
    # mmpretrain: plain nn.Conv2d throughout
    model = timm.create_model("replknet_test")
    depthwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    plain = [m for m in depthwise if not isinstance(m, replknet.nn.DepthwiseConv2d)]
    assert {m.stride for m in plain} == {(2, 2)}
    assert len(depthwise) - len(plain) == 1 + 2 * 5


def test_pruned_features_equal_the_whole_networks():
    whole = timm.create_model("replknet_test").eval()
    part = timm.create_model("replknet_test", features_only=True, out_indices=(1, -2)).eval()
    part.model.load_state_dict(whole.state_dict(), strict=False)
    x = images(whole)
    expected = whole.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(part(x), expected, strict=True))
    assert not any("stages.3" in key or "head" in key for key in part.state_dict())


def test_norms_of_features_leave_the_road_to_the_next_stage_alone():
    torch.manual_seed(0)
    plain = timm.create_model("replknet_test", features_only=True).eval()
    normed = timm.create_model("replknet_test", features_only=True, norm_intermediate_features=True).eval()
    missing = normed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {key.split(".")[3] for key in missing} == {"norm"}
    x = images(plain)
    for a, b in zip(plain(x), normed(x), strict=True):
        torch.testing.assert_close(b, a / (1 + 1e-5) ** 0.5)
    with pytest.raises(ValueError, match="norms that a classifier never uses; pass features_only=True"):
        timm.create_model("replknet_test", norm_intermediate_features=True)


def test_input_channels_classes_and_rates():
    model = timm.create_model("replknet_test", in_chans=1, num_classes=7, drop_path_rate=0.3, drop_rate=0.1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.075, 0.075, 0.15, 0.15, 0.225, 0.225, 0.3, 0.3])
    assert model.no_weight_decay() == set()
    assert model.get_classifier() is model.head


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=FULL)])
def test_checkpointing_changes_no_gradient_and_no_statistic(compiled):
    model = timm.create_model("replknet_test")
    x = images(model, 2)
    found = []
    for checkpointed in (False, True):
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(checkpointed)
        call = torch.compile(other, backend="aot_eager") if checkpointed and compiled else other
        call(x).sum().backward()
        # with the norms' statistics, which the second pass must not count again
        found.append({name: p.grad for name, p in other.named_parameters()} | dict(other.named_buffers()))
    exact = {} if compiled else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[1], found[0], **exact)


def test_groups_of_layer_decay_are_the_official_ones():
    model = meta("replknet_31b", features_only=True, norm_intermediate_features=True).model
    group = model.group_matcher()
    expected = {
        "stem.0.conv.weight": 0,
        "stages.0.blocks.3.pw1.conv.weight": 1,
        "transitions.0.0.conv.weight": 1,
        "stages.1.blocks.0.prelkb_bn.weight": 2,
        "transitions.1.1.bn.bias": 2,
        "stages.2.blocks.0.pw1.conv.weight": 3,
        "stages.2.blocks.3.pw1.conv.weight": 3,
        "stages.2.blocks.4.pw1.conv.weight": 4,
        "stages.2.blocks.35.pw2.bn.weight": 11,
        "transitions.2.0.conv.weight": 11,
        "stages.3.blocks.1.pw1.conv.weight": 12,
        "norm.weight": 13,
        "head.bias": 13,
        # official code: ValueError
        "stages.0.norm.weight": 1,
        "stages.2.norm.weight": 11,
    }
    assert {name: group(name) for name in expected} == expected
    assert model.group_matcher(coarse=True)("stages.2.blocks.0.pw1.conv.weight") == 3


def test_layer_decay_through_timm():
    model = timm.create_model("replknet_test")
    optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scales = {g["lr_scale"] for g in optimiser.param_groups}
    assert max(scales) == 1.0
    assert len(scales) == len({model.group_matcher()(name) for name, _ in model.named_parameters()})
    assert sum(len(g["params"]) for g in optimiser.param_groups) == len(list(model.parameters()))


def test_no_weights_were_released():
    with pytest.raises(RuntimeError, match=r"no weights were released for replknet_nano\.untrained; build it with"):
        timm.create_model("replknet_nano", pretrained=True)


def test_weights_without_an_address_say_where_they_are():
    message = r"download RepLKNet-31L_ImageNet-22K\.pth by hand \(Google Drive id 16jc.*load_checkpoint\(model, "
    with pytest.raises(RuntimeError, match=message):
        timm.create_model("replknet_31l.in22k", pretrained=True)


def test_pretrained_cfgs():
    assert timm.get_pretrained_cfg("replknet_31b").tag == "in1k"
    xl = timm.get_pretrained_cfg("replknet_xl")
    assert (xl.input_size, xl.mean, xl.std) == ((3, 320, 320), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert timm.get_pretrained_cfg("replknet_31b.in1k_384").crop_mode == "squash"
    assert timm.get_pretrained_cfg("replknet_31b.in22k").num_classes == 21841


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": (31, 29)}, "must have one value for each stage, got \\(31, 29\\)"),
        ({"kernels": (31, 29, 27, 12)}, "kernel sides must be odd, got 12"),
        ({"small_kernel": 4}, "kernel sides must be odd, got 4"),
        ({"small_kernel": 15}, "small_kernel must not be larger than the kernels .* got 15; None builds no"),
        ({"stem_stride": 3}, "stem_stride must be 1, 2 or 4, got 3"),
    ],
)
def test_configuration_errors(change, message):
    with pytest.raises(ValueError, match=message):
        RepLKNetConfig(**change)


def test_configuration_from_lists_compares_equal():
    assert RepLKNetConfig(kernels=[31, 29, 27, 13]) == RepLKNetConfig()
    assert isinstance(RepLKNet(CONFIGS["replknet_test"], num_classes=0)(torch.randn(1, 3, 64, 64)), torch.Tensor)
