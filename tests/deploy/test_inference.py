"""The inference form: equal to its source in every form, task, type and size, and checked when it is made."""

import copy
import pickle
from statistics import median

import pytest
import timm
import torch
from torch import nn

from matrix import matrix
from replknet.deploy import inference, inference_layers, rewrite
from replknet.deploy.inference import BOUNDS, optimize
from replknet.difference import largest_difference
from replknet.nn import merge


def shaken(model):
    """With norms that change what they see and statistics of real outputs, so that one that is lost is seen."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 64, 64))
    return model.eval()


def classifier(**options):
    return shaken(timm.create_model("replknet_test", num_classes=7, **options))


@pytest.fixture(autouse=True)
def _small_maps_too(monkeypatch):
    monkeypatch.setattr(rewrite, "_WINOGRAD_PIXELS", 1)


def segmenter():
    from replknet.tasks.segmentation.heads import UperNet  # a machine with a GPU may not have its packages

    backbone = timm.create_model("replknet_test", features_only=True, channels=(64, 64, 64, 72))
    return shaken(UperNet(backbone, 5, channels=64, auxiliary_channels=16))


NETWORKS = {
    "classifier": classifier,
    "narrow": lambda: shaken(timm.create_model("replknet_test", num_classes=7, stem_stride=1)),
    "wide kernels": lambda: classifier(dw_ratio=1.5, small_kernel=None),
    "pooled features": lambda: shaken(timm.create_model("replknet_test", num_classes=0)),
    "a map": lambda: shaken(timm.create_model("replknet_test", num_classes=0, global_pool="")),
    "largest values": lambda: classifier(global_pool="max"),
    "features": lambda: shaken(timm.create_model("replknet_test", features_only=True)),
    "normed features": lambda: shaken(
        timm.create_model("replknet_test", features_only=True, norm_intermediate_features=True)
    ),
    "mobilenet": lambda: shaken(timm.create_model("mobilenetv2_lk", num_classes=7, kernels=(7,) * 7)),
    "segmentation": segmenter,
}
FORMS = {"trained": lambda m: m, "merged": merge, "branches merged": lambda m: merge(m, fold_bn=False)}


def outputs(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


def assert_equal(a, b, bound):
    for one, other in zip(outputs(a), outputs(b), strict=True):
        assert one.shape == other.shape
        assert largest_difference(other, one)[1] <= bound


@pytest.mark.parametrize("name", matrix(NETWORKS, ["classifier", "normed features", "segmentation"]))
@torch.no_grad()
def test_it_is_its_source_at_any_batch_and_size(name):
    model = NETWORKS[name]()
    exact = copy.deepcopy(model).double()
    optimized = optimize(model, torch.randn(2, 3, 64, 96))
    exactly = optimize(exact, torch.randn(2, 3, 64, 96).double())
    ratios = []
    for shape in ((2, 3, 64, 96), (1, 3, 33, 47), (5, 3, 70, 64)):
        x = torch.randn(shape)
        truth = exact(x.double())
        # else the inputs might not matter
        assert largest_difference(outputs(truth)[-1], outputs(exact(-x.double()))[-1])[1] > 1e-2
        # no step is lost or done twice
        assert_equal(exactly(x.double()), truth, BOUNDS[torch.float64])
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            found = optimized(image)
            assert_equal(found, truth, BOUNDS[torch.float32])
            for a, b, c in zip(outputs(truth), outputs(model(x)), outputs(found), strict=True):
                ratios.append(largest_difference(a, c)[1] / largest_difference(a, b)[1])
    # and float32 rounds no worse than the source; one rounding of such small networks says little beside another
    assert median(ratios) <= 2, ratios


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_is_taken_and_stays_as_it_was(form):
    model = FORMS[form](classifier()).train()
    model.stages[0].eval()
    modes = [m.training for m in model.modules()]
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 64, 64)
    optimized = optimize(model, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_equal(optimized(x), model.eval()(x), 1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types_compute_in_theirs_and_answer_in_the_input_s(dtype):
    model, x = classifier(), torch.randn(2, 3, 64, 64)
    optimized = optimize(model, x, dtype=dtype)
    y = optimized(x)
    assert (optimized.report.dtype, y.dtype) == (dtype, torch.float32)
    assert_equal(y, model(x), BOUNDS[torch.float32 if dtype == torch.float64 else dtype])
    assert largest_difference(model(x), y)[1] > 0
    wide = model.double()
    assert optimize(wide, x.double())(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["classifier", "features", "segmentation"])
@torch.no_grad()
def test_bfloat16_rounds_no_more_than_the_source_in_it(name, monkeypatch):
    # these networks amplify rounding, more than our trained one does
    monkeypatch.setitem(BOUNDS, torch.bfloat16, 0.5)
    model, x = NETWORKS[name](), torch.randn(2, 3, 64, 96)
    optimized = optimize(model, x, dtype=torch.bfloat16)
    rounded = outputs(copy.deepcopy(model).bfloat16()(x.bfloat16()))
    for truth, source, got in zip(outputs(model(x)), rounded, outputs(optimized(x)), strict=True):
        assert got.dtype == torch.float32
        assert largest_difference(truth, got)[1] <= 1.2 * largest_difference(truth, source.float())[1]
    # Winograd's transforms would amplify its rounding
    assert optimized.report.winograd == 0


def test_report_says_what_was_done(monkeypatch):
    report = optimize(segmenter(), torch.randn(1, 3, 64, 64)).report
    # 5 pairs of blocks with 4, a stem with 1, 3 transitions with 1; 3 laterals, 4 levels of the pyramid, the classifier
    # is not exactly nn.Conv2d
    assert report.products == 5 * 4 + 1 + 3 + 3 + 4
    # 5 large kernels and the stem's second layer; the strided ones are torch's
    assert report.operator == 6
    # three levels and two bottlenecks
    assert report.winograd == 5
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "_WINOGRAD_PIXELS", 256)
        # one level of 16x16, and what is joined at its size
        assert optimize(segmenter(), torch.randn(1, 3, 64, 64)).report.winograd == 2
    assert report.unfolded == ()
    assert report.times == {}
    assert 0 < report.difference.relative <= report.bound == 1e-4
    assert "none" in str(report)
    # what follows a feature's own norm is not known
    normed = optimize(NETWORKS["normed features"](), torch.randn(1, 3, 64, 64)).report
    assert len(normed.unfolded) == 4
    assert all(name.endswith(".norm") for name in normed.unfolded)


@pytest.mark.parametrize(
    ("name", "products", "operator", "winograd", "layers"),
    [
        # 4 a pair of blocks, 3 in transitions and 1 in the stem; the large kernels and the stem's second layer
        ("classifier", 24, 6, 0, {"LargeKernelBlock": 5, "FeedForward": 5, "Grouped": 8}),
        # the stem's last layer has no stride, and so it is on the operator, too
        ("narrow", 24, 7, 0, {"LargeKernelBlock": 5, "FeedForward": 5, "Grouped": 8}),
        ("features", 24, 6, 0, {"LargeKernelBlock": 5, "FeedForward": 5, "Grouped": 8}),
        # ReLU6 is a step of its own
        ("mobilenet", 34, 0, 0, {}),
        ("segmentation", 31, 6, 5, {"LargeKernelBlock": 5, "FeedForward": 5, "Grouped": 8, "PyramidHead": 1}),
    ],
)
def test_each_kind_of_network_gets_these_layers(name, products, operator, winograd, layers):
    optimized = optimize(NETWORKS[name](), torch.randn(1, 3, 64, 64))
    report = optimized.report
    assert (report.products, report.operator, report.winograd) == (products, operator, winograd)
    names = [type(module).__name__ for module in optimized.network.modules()]
    kinds = ("LargeKernelBlock", "FeedForward", "Grouped", "PyramidHead")
    assert {kind: names.count(kind) for kind in kinds if kind in names} == layers
    # neither norms after a convolution nor what only training uses is left
    assert not {"UperNetConvModule", "UperNetFCNHead"} & set(names)


def test_products_are_packed_where_torch_has_onednn():
    optimized = optimize(classifier(), torch.randn(1, 3, 64, 64))
    assert optimized.report.packed == torch.backends.mkldnn.is_available()


@torch.no_grad()
def test_without_onednn_it_is_the_same(monkeypatch):
    monkeypatch.setattr(inference_layers, "packs", lambda like: False)
    model, x = segmenter(), torch.randn(1, 3, 64, 64)
    assert_equal(optimize(model, x)(x), model(x), 1e-4)


@pytest.mark.parametrize("budget", matrix([1, 5000, 40000], [5000]))
@torch.no_grad()
def test_parts_that_fit_the_cache_give_the_same(budget, monkeypatch):
    model = segmenter().double()
    monkeypatch.setattr(inference_layers, "CACHE_BYTES", budget)
    optimized = optimize(model, torch.randn(1, 3, 64, 64).double())
    for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 71, 45), (1, 3, 130, 33)):
        x = torch.randn(shape).double()
        assert_equal(optimized(x), model(x), 1e-10)
    for stride in (1, 2):
        narrow = shaken(timm.create_model("replknet_test", num_classes=7, stem_stride=stride)).double()
        x = torch.randn(2, 3, 37, 41).double()
        assert_equal(optimize(narrow, x)(x), narrow(x), 1e-10)


@pytest.mark.parametrize(
    ("budget", "parts"), [(40000, [(1, 64)] * 6), (16384, [(1, 40), (1, 40)] * 6), (10**6, [(6, 64)])]
)
@torch.no_grad()
def test_maps_of_the_stem_fit_the_cache(budget, parts, monkeypatch):
    monkeypatch.setattr(inference_layers, "CACHE_BYTES", budget)
    optimized = optimize(classifier(), torch.randn(1, 3, 64, 64))
    seen = []
    # 8 channels of float32 on a quarter of the pixels: 8 bytes a pixel
    optimized.network.stem[0].layers.register_forward_pre_hook(lambda m, x: seen.append((len(x[0]), x[0].shape[2])))
    optimized(torch.randn(6, 3, 64, 64))
    assert seen == parts


def test_memory_that_is_freed_stays_if_wanted(monkeypatch):
    called = []
    monkeypatch.setattr(inference, "keep_freed_memory", lambda: called.append(True))
    optimize(classifier(), torch.randn(1, 3, 64, 64))
    assert called == []
    optimize(classifier(), torch.randn(1, 3, 64, 64), keep_memory=True)
    assert called == [True]


def test_what_differs_is_not_made(monkeypatch):
    original = inference_layers.FeedForward._some
    monkeypatch.setattr(inference_layers.FeedForward, "_some", lambda self, x: original(self, x) * 1.001)
    with pytest.raises(RuntimeError, match=r"may differ from the source's by 1e-04.* got \d"):
        optimize(classifier(), torch.randn(1, 3, 64, 64))
    monkeypatch.setattr(inference_layers.FeedForward, "_some", lambda self, x: x * torch.nan)
    with pytest.raises(RuntimeError, match="got nan"):
        optimize(classifier(), torch.randn(1, 3, 64, 64))


def test_wrong_examples_are_refused():
    model = classifier()
    with pytest.raises(ValueError, match=r"images \[N,3,H,W\], got \[3, 64, 64\]"):
        optimize(model, torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, got torch.float64"):
        optimize(model, torch.randn(1, 3, 64, 64).double())
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch.int8"):
        optimize(model, torch.randn(1, 3, 64, 64), dtype=torch.int8)
    optimized = optimize(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"x\[None\] adds a batch"):
        optimized(torch.randn(3, 64, 64))


def test_it_is_for_inference_alone():
    optimized = optimize(classifier(), torch.randn(1, 3, 64, 64))
    assert not optimized.training
    assert optimized.eval() is optimized
    with pytest.raises(RuntimeError, match="train its source"):
        optimized.train()
    with pytest.raises(RuntimeError, match="save its source"):
        pickle.dumps(optimized)
    with pytest.raises(RuntimeError, match="save its source"):
        copy.deepcopy(optimized)
    assert optimized(torch.randn(1, 3, 64, 64)).is_inference()


@pytest.mark.full
@torch.no_grad()
def test_torch_compile_is_measured_and_kept_if_faster(monkeypatch):
    model, x = classifier(), torch.randn(1, 3, 64, 64)
    for faster in (inference._LAYERS, inference._COMPILED):
        real = inference.interleaved

        def measured(calls, runs, faster=faster, real=real):
            found = real(calls, runs)
            return {name: inference.Timing(0.0, 0.0, 0.0, runs) if name == faster else found[name] for name in calls}

        with monkeypatch.context() as patch:
            patch.setattr(inference, "interleaved", measured)
            optimized = optimize(model, x, compile=True)
        assert optimized.report.compiled == (faster == inference._COMPILED)
        assert set(optimized.report.times) == {inference._LAYERS, inference._COMPILED}
        assert_equal(optimized(x), model(x), 1e-4)
        assert_equal(optimized(torch.randn(1, 3, 64, 64).copy_(x)), model(x), 1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_it_is_its_source():
    model, x = classifier().cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "compile": True}):
        optimized = optimize(model, x, **options)
        first, second = optimized(x), optimized(x * 2)
        bound = BOUNDS[options.get("dtype", torch.float32)]
        assert_equal(first, model(x), max(bound, 1e-3))
        assert not torch.equal(first, second)
