"""Names of mmdetection's detectors: every one of them, both ways."""

import pytest
import timm
import torch

from replknet.models.detection_keys import from_mmdet, to_mmdet
from replknet.models.key_formats import to_official
from replknet.tasks.detection.cascade import CascadeRCNN
from replknet.tasks.detection.fcos import FCOS
from replknet.tasks.detection.files import described

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def detector(kind, name, classes=80):
    with torch.device("meta"):
        options = {"norm_intermediate_features": True} if name == "replknet_xl" else {}
        return kind(timm.create_model(name, features_only=True, **options), classes)


def backbone(name):
    """Official names of the backbone: a network without its final norm and classifier."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0).state_dict()
    keys = {f"backbone.{key}" for key in whole if not key.startswith("norm.")}
    if name == "replknet_xl":
        keys |= {f"backbone.stages.{stage}.norm.{n}" for stage in range(4) for n in NORM}
    return keys


def both(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_fcos_has_the_names_of_mmdetection():
    own = detector(FCOS, "replknet_31b").state_dict()
    theirs = to_mmdet(own)
    expected = backbone("replknet_31b")
    expected |= both(*(f"neck.lateral_convs.{i}.conv" for i in range(3)))
    # three levels, and two more on top of them
    expected |= both(*(f"neck.fpn_convs.{i}.conv" for i in range(5)))
    for tower in ("cls_convs", "reg_convs"):
        # no bias before a norm
        expected |= {f"bbox_head.{tower}.{i}.conv.weight" for i in range(4)}
        expected |= both(*(f"bbox_head.{tower}.{i}.gn" for i in range(4)))
    expected |= both("bbox_head.conv_cls", "bbox_head.conv_reg", "bbox_head.conv_centerness")
    expected |= {f"bbox_head.scales.{i}.scale" for i in range(5)}
    assert set(theirs) == expected
    assert set(from_mmdet(theirs)) == set(to_official(theirs)) == set(own)
    shapes = {key: tuple(theirs[key].shape) for key in theirs}
    assert shapes["neck.lateral_convs.0.conv.weight"] == (256, 256, 1, 1)
    assert shapes["bbox_head.conv_cls.weight"] == (80, 256, 3, 3)
    assert shapes["bbox_head.scales.0.scale"] == ()


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_cascade_has_the_names_of_mmdetection(name):
    own = detector(CascadeRCNN, name).state_dict()
    theirs = to_mmdet(own)
    expected = backbone(name)
    expected |= both(*(f"neck.{part}.{i}.conv" for part in ("lateral_convs", "fpn_convs") for i in range(4)))
    expected |= both("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg")
    for stage in range(3):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        for i in range(4):
            expected |= {f"{box}.shared_convs.{i}.conv.weight"}
            expected |= {f"{box}.shared_convs.{i}.bn.{n}" for n in NORM}
        expected |= both(f"{box}.shared_fcs.0", f"{box}.fc_cls", f"{box}.fc_reg")
        expected |= both(*(f"{mask}.convs.{i}.conv" for i in range(4)), f"{mask}.upsample", f"{mask}.conv_logits")
    assert set(theirs) == expected
    assert set(from_mmdet(theirs)) == set(to_official(theirs)) == set(own)
    shapes = {key: tuple(theirs[key].shape) for key in theirs}
    assert shapes["roi_head.bbox_head.2.shared_fcs.0.weight"] == (1024, 256 * 7 * 7)
    # the background is the last class, and each class has its own differences
    assert (shapes["roi_head.bbox_head.0.fc_cls.weight"], shapes["roi_head.bbox_head.0.fc_reg.weight"]) == (
        (81, 1024), (320, 1024),
    )  # fmt: skip
    assert shapes["roi_head.mask_head.0.upsample.weight"] == (256, 256, 2, 2)
    assert shapes["rpn_head.rpn_reg.weight"] == (12, 256, 1, 1)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (FCOS, "replknet_31b", ("fcos", {}, 0.485)),
        (CascadeRCNN, "replknet_31l", ("cascade_mask_rcnn", {}, 0.485)),
        (CascadeRCNN, "replknet_xl", ("cascade_mask_rcnn", {"norm_intermediate_features": True}, 0.5)),
    ],
)
def test_an_official_detector_is_understood_from_its_keys(kind, name, expected):
    found = described(to_official(to_mmdet(detector(kind, name).state_dict())))
    assert (found.detector, found.network, found.mean[0]) == expected
    assert (found.backbone, found.channels, found.scale) == (name, 256, (1333, 800))
    assert (found.classes[0], found.classes[79]) == ("person", "toothbrush")
