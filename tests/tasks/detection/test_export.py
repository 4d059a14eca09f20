"""Detectors as files: every road computes what torch does, at sizes that were not traced, and else leaves no file."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import replknet
from matrix import matrix
from replknet.deploy.verify import in_onnxruntime
from replknet.tasks.detection import export as detectors
from replknet.tasks.detection.cascade import CascadeRCNN
from replknet.tasks.detection.export import export_detector, export_pyramid
from replknet.tasks.detection.fcos import FCOS
from replknet.tasks.detection.pyramid import Pyramid
from replknet.tasks.detection.torchvision_detectors import mask_rcnn, torchvision_fcos


def backbone():
    return timm.create_model("replknet_test", features_only=True)


MAKE = {
    "torchvision_fcos": lambda: torchvision_fcos(backbone(), 3, 64),
    "mask_rcnn": lambda: mask_rcnn(backbone(), 3, 16),
    "fcos": lambda: FCOS(backbone(), 3, 16),
    "cascade_rcnn": lambda: CascadeRCNN(backbone(), 3, False, 16, 32),
    "cascade_mask_rcnn": lambda: CascadeRCNN(backbone(), 3, True, 16, 32),
}
# the layers of classes and of boxes, and the weights (deviation) and bias of the former: objects are found in noise,
# few or many by the image, and none in an empty one
HEADS = {
    "torchvision_fcos": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg", 0.3, -8.0),
    "mask_rcnn": ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", 4.0, 3.2),
    "fcos": ("bbox_head.conv_cls", "bbox_head.conv_reg", 0.5, -8.0),
    "cascade_rcnn": ("fc_cls", "fc_reg", 16.0, 3.0),
    "cascade_mask_rcnn": ("fc_cls", "fc_reg", 16.0, 3.5),
}


def untidy(name):
    torch.manual_seed(0)
    model = MAKE[name]()
    classes, boxes, deviation, bias = HEADS[name]
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # without a shift, an empty image leaves nothing but the biases of the heads
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif path.endswith(classes):
            nn.init.normal_(module.weight, std=deviation)
            # of background, which is torchvision's first class and our last
            chosen = slice(None) if "fcos" in name else 0 if name == "mask_rcnn" else -1
            module.bias.data[chosen] = bias
            if "fcos" not in name:
                nn.init.zeros_(module.weight[chosen])
        elif path.endswith(boxes):
            nn.init.normal_(module.weight, std=0.3)
            if "fcos" in name:
                nn.init.constant_(module.bias, 3.0 if name == "fcos" else 1.0)
    return model.eval()


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# ---- the pyramid


@pytest.fixture(scope="module", params=matrix(["fcos", "mask_rcnn"], ["fcos"]))
def model(request):
    """One with convolutions for its last levels, one with pooling."""
    return untidy(request.param)


def levels(model, x):
    (pyramid,) = (module for module in model.modules() if isinstance(module, Pyramid))
    with torch.no_grad():
        return pyramid(x)


def sizes(model):
    smallest = strides(model)[-1] + 32
    return [(1, smallest, smallest), (3, smallest + 32, 2 * smallest), (2, 352, smallest + 64)]


def strides(model):
    return next(module for module in model.modules() if isinstance(module, Pyramid)).strides


@pytest.mark.parametrize("ending", matrix([".onnx", ".pt2", ".xml"], [".onnx"]))
def test_a_pyramid_is_right_at_other_sizes_than_the_traced_one(ending, model, tmp_path):
    path = tmp_path / "made" / f"pyramid{ending}"
    found = export_pyramid(model, path, noise(1, 3, 160, 192))
    assert 0 < found.relative < detectors.BOUND / 5
    assert found.absolute < 1e-4
    assert {file.name for file in path.parent.iterdir()} == {path.name} | (
        {"pyramid.bin"} if ending == ".xml" else set()
    )
    run = detectors._ROADS[ending][1](path)
    for n, height, width in sizes(model):
        x = noise(n, 3, height, width)
        for stride, wanted, got in zip(strides(model), levels(model, x), run(x), strict=True):
            assert got.shape == (n, wanted.shape[1], -(-height // stride), -(-width // stride))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_the_nodes_of_a_pyramid_are_standard_ones(tmp_path):
    import onnx

    model = untidy("fcos")
    export_pyramid(model, tmp_path / "pyramid.onnx", noise(1, 3, 160, 192))
    file = onnx.load(tmp_path / "pyramid.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert {opset.domain for opset in file.opset_import} == {""}
    assert len(file.functions) == 0
    # the large kernels are convolutions with as many groups as channels
    weights = {tensor.name: list(tensor.dims) for tensor in file.graph.initializer}
    found = {}
    for node in file.graph.node:
        if node.op_type == "Conv":
            (groups,) = (a.i for a in node.attribute if a.name == "group")
            channels, inputs, *kernel = weights[node.input[1]]
            if groups == channels > 1 and inputs == 1:
                found[kernel[0]] = found.get(kernel[0], 0) + 1
    merged = replknet.merge(model)
    expected = [
        m.kernel_size[0] for m in merged.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1
    ]
    assert found == {side: expected.count(side) for side in expected}
    assert max(found) >= 9
    names = [output.name for output in file.graph.output]
    assert names == [f"stride_{stride}" for stride in strides(model)]


@pytest.mark.full
def test_the_model_stays_as_it_was_and_half_precision_is_exported_in_float32(tmp_path):
    model = untidy("mask_rcnn").bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_pyramid(model, tmp_path / "pyramid.pt2", noise(1, 3, 96, 96))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == before[key].dtype for key in before)
    assert all(
        level.dtype == torch.float32
        for level in detectors._ROADS[".pt2"][1](tmp_path / "pyramid.pt2")(noise(1, 3, 96, 96))
    )


@pytest.mark.full
def test_a_pyramid_that_misses_the_bound_is_not_left_behind(tmp_path, monkeypatch):
    path = tmp_path / "pyramid.xml"
    path.write_text("an older file")
    monkeypatch.setattr(detectors, "BOUND", 1e-9)
    with pytest.raises(RuntimeError, match=r"the level of stride \d+ may differ by 1e-09 of the norm, got \d\.\de-07"):
        export_pyramid(untidy("mask_rcnn"), path, noise(1, 3, 96, 96))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "an older file"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (noise(3, 96, 96), r"expected an image \[1,3,H,W\] in float32, got \[3, 96, 96\]"),
        (noise(1, 3, 96, 96).half(), "float32, got .* in torch.float16"),
        (noise(2, 3, 96, 96), r"expected one image .* got \[2, 3, 96, 96\]"),
        (noise(1, 3, 96, 100), "multiples of 32 and at least 96, got .* pad it"),
        (noise(1, 3, 64, 96), r"multiples of 32 and at least 96, got \[1, 3, 64, 96\]"),
    ],
)
def test_the_example_of_a_pyramid_is_named_in_the_error(example, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_pyramid(MAKE["mask_rcnn"](), tmp_path / "a.onnx", example)


def test_only_a_detector_has_a_pyramid(tmp_path):
    for export, x in ((export_pyramid, noise(1, 3, 96, 96)), (export_detector, noise(3, 96, 96))):
        with pytest.raises(ValueError, match="with one feature pyramid, got a FeatureGetterNet"):
            export(backbone(), tmp_path / "a.onnx", x)
    with pytest.raises(ValueError, match=r"ends in \.onnx, \.pt2, \.xml, got a\.trt"):
        export_pyramid(MAKE["fcos"](), tmp_path / "a.trt", noise(1, 3, 96, 96))


# ---- whole detectors


@pytest.mark.parametrize("name", matrix(MAKE, ["fcos"]))
def test_a_detector_in_onnxruntime_finds_what_it_finds_in_torch(name, tmp_path):
    model = untidy(name)
    path = tmp_path / "detector.onnx"
    # no side is a multiple of 32
    found = export_detector(model, path, noise(3, 70, 100))
    assert 0 < found.relative < 1e-5
    assert found.absolute < 1e-2
    run = session(path)
    assert [(x.name, x.shape) for x in run.get_inputs()] == [("image", [3, 70, 100])]
    names = [output.name for output in run.get_outputs()]
    assert names == ["boxes", "labels", "scores"] + ["masks"] * ("mask" in name)
    counts = []
    images = [noise(3, 70, 100, seed=i) * scale for i, scale in enumerate((1, 0.3))]
    # a patch on nothing, and nothing
    images += [F.pad(noise(3, 20, 30), (40, 30, 30, 20)), torch.zeros(3, 70, 100)]
    for image in images:
        with torch.no_grad():
            (wanted,) = model([image])
        got = dict(zip(names, map(torch.from_numpy, run.run(None, {"image": image.numpy()})), strict=True))
        assert {output: x.shape for output, x in got.items()} == {output: wanted[output].shape for output in names}
        torch.testing.assert_close(got["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
        for i, box in enumerate(wanted["boxes"]):
            # those of nearly one score may have changed places
            same = ((got["boxes"] - box).abs().amax(1) < 1e-2) & (got["labels"] == wanted["labels"][i])
            same &= (got["scores"] - wanted["scores"][i]).abs() < 1e-4
            # two boxes without an area may be equal
            assert same.any()
            if "mask" in name:
                # pasted at whole pixels
                assert (got["masks"][same][0] - wanted["masks"][i]).abs().mean() < 1e-2
        counts.append(len(wanted["boxes"]))
    # the test would say little of one number of boxes
    assert len(set(counts)) > 2
    assert counts[0] > 10
    assert counts[-1] == 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_detector_that_misses_the_bound_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(detectors.BOUNDS, "scores", 1e-12)
    with pytest.raises(RuntimeError, match="scores may differ by 1e-12 of the norm"):
        export_detector(untidy("fcos"), tmp_path / "a.onnx", noise(3, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_finds_another_number_of_boxes_is_not_left_behind(tmp_path, monkeypatch):
    model = untidy("fcos")
    run = in_onnxruntime
    monkeypatch.setattr(detectors, "in_onnxruntime", lambda path: lambda x: [output[1:] for output in run(path)(x)])
    with pytest.raises(RuntimeError, match=r"expected scores \[\d+\], got \[\d+\]"):
        export_detector(model, tmp_path / "a.onnx", noise(3, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_boxes_of_nearly_one_score_may_change_places():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [3, 3, 9, 9]])
    wanted = {"boxes": boxes, "labels": torch.tensor([0, 1, 0]), "scores": torch.full((3,), 0.4)}
    got = {"boxes": boxes[[2, 0, 1]] + 1e-3, "labels": torch.tensor([0, 0, 1]), "scores": torch.full((3,), 0.4)}
    assert detectors._nearest(wanted, got).tolist() == [1, 2, 0]


def test_a_whole_detector_for_another_runtime_is_refused_with_the_reason(tmp_path):
    for ending, reason in (
        (".pt2", "refuses sizes that depend on the image.*data-dependent.*The way out is export_pyramid"),
        (".xml", "OpenVINO cannot read the loop that pastes masks.*The way out is export_pyramid"),
        (".trt", r"to \.onnx, got a\.trt: this ending is unknown.*The way out is export_pyramid"),
    ):
        with pytest.raises(ValueError, match=reason):
            export_detector(MAKE["fcos"](), tmp_path / f"a{ending}", noise(3, 64, 64))


def test_the_reason_is_torchs():
    model = detectors._OneImage(untidy("cascade_rcnn")).eval()
    with pytest.raises(
        torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
        match="Could not guard on data-dependent expression",
    ):
        torch.export.export(model, (noise(3, 64, 64),))


def test_the_example_of_a_detector_is_named_in_the_error(tmp_path):
    model = untidy("fcos")
    with pytest.raises(ValueError, match=r"expected an image \[3,H,W\] in float32, got \[1, 3, 64, 64\]"):
        export_detector(model, tmp_path / "a.onnx", noise(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"finds nothing in the example.*give an image with objects"):
        export_detector(model, tmp_path / "a.onnx", torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="got only a pyramid: export_pyramid"):
        export_detector(model.pyramid, tmp_path / "a.onnx", noise(3, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_onnx_lacks_is_named(tmp_path):
    class Inverse(nn.Module):
        def forward(self, x):
            return x + 0 * torch.linalg.eigvals(x[0, 0, :2, :2].detach()).real.sum()

    model = untidy("torchvision_fcos")
    model.head.classification_head.conv.append(Inverse())
    with pytest.raises(ValueError, match=r"a layer that ONNX lacks: .*eigvals.* The way out is export_pyramid"):
        export_detector(model, tmp_path / "a.onnx", noise(3, 300, 300))
