"""What timm 1.0.31's own tests ask of a model (tests/test_models.py of its sdist), for both families of networks.

docs/timm.md says which of those tests do not apply, and why.
"""

import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import nn

import replknet  # noqa: F401  # registers the networks
from matrix import FULL, matrix
from replknet.nn import DepthwiseConv2d

# two variants of one family, and the other family
NAMES = ["replknet_test", pytest.param("replknet_cifar", marks=FULL), "mobilenetv2_lk"]
pytestmark = pytest.mark.parametrize("name", NAMES)
scripts = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def test_device_and_dtype_are_those_asked_for(name):
    for options in ({}, {"features_only": True}, {"num_classes": 0}):
        model = timm.create_model(name, device="meta", dtype=torch.bfloat16, **options)
        assert {t.device.type for t in tensors(model)} == {"meta"}
        assert {t.dtype for t in tensors(model) if t.is_floating_point()} == {torch.bfloat16}
    low = timm.create_model(name, device="cpu", dtype=torch.bfloat16).eval()
    assert low(X.bfloat16()).dtype == torch.bfloat16
    torch.manual_seed(0)
    plain = timm.create_model(name)
    torch.manual_seed(0)
    wide = timm.create_model(name, dtype=torch.float64)
    assert all(torch.equal(a.double(), b) for a, b in zip(tensors(plain), tensors(wide), strict=True))
    with pytest.raises(TypeError, match="not_a_model_arg"):
        timm.create_model(name, not_a_model_arg=1)


def test_a_network_built_on_the_meta_device_gets_its_values_later(name):
    torch.manual_seed(0)
    truth = timm.create_model(name)
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in tensors(model):
            t.fill_(float("nan") if t.is_floating_point() else -1)
    model.init_weights()
    for (key, value), want in zip(model.state_dict().items(), truth.state_dict().values(), strict=True):
        assert value.isfinite().all(), key
        assert (value >= 0).all() or value.is_floating_point(), key
        # drawn alike, though from other random numbers
        assert value.float().std(correction=0) == pytest.approx(want.float().std(correction=0).item(), rel=0.5), key


@scripts
@pytest.mark.parametrize(
    "options",
    matrix([({},), ({"out_indices": (0, 2)},), ({"out_indices": (-1,)},)], [({"out_indices": (0, 2)},)]),
    ids=str,
)
def test_features_are_scripted(name, options):
    model = timm.create_model(name, features_only=True, **options).eval()
    for got, want in zip(torch.jit.script(model)(X), model(X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@scripts
def test_features_that_a_getter_takes_are_scripted(name):
    whole = timm.create_model(name).eval()
    getter = FeatureGetterNet(copy.deepcopy(whole), out_indices=[0, 1], norm=True, prune=False)
    want = whole.forward_intermediates(X, indices=[0, 1], norm=True, intermediates_only=True)
    for got, one in zip(torch.jit.script(getter)(X), want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


@scripts
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # torch.fx's own class
def test_a_graph_of_fx_is_scripted_and_has_the_operator_as_nodes(name):
    model = timm.create_model(name).eval()
    traced = torch.fx.symbolic_trace(model)
    nodes = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    # the layers of a network are no leaves for it, so each convolution is a call
    assert nodes.count("depthwise") == sum(isinstance(m, DepthwiseConv2d) for m in model.modules())
    assert "strided_depthwise" in nodes
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(torch.jit.script(traced)(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_new_layers_are_in_the_mode_of_the_model(name, training):
    model = timm.create_model(name).train(training)
    for change in (
        lambda: model.reset_classifier(7),
        lambda: model.reset_classifier(0, ""),
        lambda: model.reset_classifier(3, "max"),
        lambda: model.prune_intermediate_layers([2], prune_norm=True),
        lambda: model.prune_intermediate_layers([0]),
    ):
        change()
        assert {module.training for module in model.modules()} == {training}


def test_a_new_classifier_is_where_the_parameters_are(name):
    model = timm.create_model(name, device="meta").to(torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert model.get_classifier().weight.device.type == "meta"
    assert model.get_classifier().weight.dtype == torch.float64
    frozen = timm.create_model(name).requires_grad_(False)
    frozen.reset_classifier(0, "")
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_reset_keeps_the_pooling_unless_another_is_named(name):
    model = timm.create_model(name, global_pool="max").eval()
    expected = model.forward_head(model.forward_features(X), pre_logits=True)
    model.reset_classifier(5)
    torch.testing.assert_close(model.forward_head(model.forward_features(X), pre_logits=True), expected)
    assert model(X).shape == (2, 5)
    model.reset_classifier(5, "avg")
    assert not torch.allclose(model.forward_head(model.forward_features(X), pre_logits=True), expected)


def test_pruned_networks_have_the_features_and_no_unused_parameter(name):
    model = timm.create_model(name, drop_rate=0.5).eval()
    whole = model.forward_intermediates(X, intermediates_only=True)
    for i, feature in enumerate(whole):
        for early in model.forward_intermediates(X, indices=[i], stop_early=True, intermediates_only=True):
            assert torch.equal(early, feature)
        pruned = copy.deepcopy(model)
        indices = pruned.prune_intermediate_layers([i], prune_norm=True)
        assert torch.equal(pruned.forward_intermediates(X, indices=indices, intermediates_only=True)[0], feature)
        assert torch.equal(pruned(X), pruned(X))
        pruned.train()
        sum(f.sum() for f in pruned.forward_intermediates(X, indices=indices, intermediates_only=True)).backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([len(whole) - 1], prune_head=False)
    assert torch.equal(pruned(X), model(X))


def test_groups_of_parameters_cover_the_model(name):
    model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert len(set(groups.values())) > 3


def test_counters_of_operations_see_what_they_see_of_torchs_layers(name):
    """fvcore traces, torch's counter sees the op; thop looks at the classes of layers (docs/timm.md)."""
    from fvcore.nn import FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode

    def counts(model):
        analysis = FlopCountAnalysis(model, X).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        with FlopCounterMode(display=False) as counter:
            model(X)
        return analysis.total(), counter.get_total_flops()

    model = timm.create_model(name).eval()
    ours = counts(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, DepthwiseConv2d):
            plain = nn.Conv2d(
                layer.in_channels,
                layer.in_channels,
                layer.kernel_size,
                padding=layer.padding,
                groups=layer.groups,
                bias=layer.bias is not None,
            )
            model.set_submodule(path, plain.eval())
    assert counts(model) == ours
    assert min(ours) > 1e6
