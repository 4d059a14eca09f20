"""UperNet: the paper's sizes and cost, the official keys in both directions, and its merged form."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import replknet
from replknet.difference import largest_difference
from replknet.models import CheckpointError, load_checkpoint
from replknet.models.key_formats import from_mmseg, to_mmseg
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary

# merged and without the auxiliary head, which is what the paper counts (112, 110, 207 and 374 M); our counts
SIZES = {
    ("replknet_31b", 150): 111_816_214,
    ("replknet_31b", 19): 111_749_011,
    ("replknet_31l", 150): 207_578_838,
    ("replknet_xl", 150): 373_944_726,
}


def build(name="replknet_test", classes=5, **options):
    heads = {key: options.pop(key) for key in ("channels", "auxiliary_channels", "align_corners") if key in options}
    return UperNet(timm.create_model(name, features_only=True, **options), classes, **heads)


def small(**options):
    torch.manual_seed(0)
    model = build(channels=16, auxiliary_channels=8, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def meta(name, classes):
    with torch.device("meta"):
        return build(name, classes, norm_intermediate_features=name == "replknet_xl")


@pytest.mark.parametrize(("name", "classes"), SIZES)
def test_parameters_are_the_papers(name, classes):
    model = without_auxiliary(replknet.merge(meta(name, classes), fold_bn=False))
    assert sum(p.numel() for p in model.parameters()) == SIZES[name, classes]


def test_multiply_adds_are_the_papers():
    # table 5 of the paper: 1170 G at 512x2048
    model = without_auxiliary(replknet.merge(meta("replknet_31b", 150), fold_bn=False)).eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.inference_mode():
        model(torch.empty(1, 3, 512, 2048))
    assert counter.get_total_flops() / 2e9 == pytest.approx(1170, abs=1)


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_keys_are_those_of_mmsegmentation_in_both_directions(name):
    model = meta(name, 150)
    own = model.state_dict()
    theirs = to_mmseg(own)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    heads = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    heads |= {"auxiliary_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"}
    layers = [f"decode_head.psp_modules.{i}.1" for i in range(4)]
    layers += [f"decode_head.{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)]
    layers += ["decode_head.bottleneck", "decode_head.fpn_bottleneck", "auxiliary_head.convs.0"]
    heads |= {f"{layer}.conv.weight" for layer in layers} | {f"{layer}.bn.{n}" for layer in layers for n in norm}
    # the official backbone: a network without its final norm and classifier
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0).state_dict()
    backbone = {f"backbone.{key}" for key in whole if not key.startswith("norm.")}
    if name == "replknet_xl":
        backbone |= {f"backbone.stages.{stage}.norm.{n}" for stage in range(4) for n in norm}
    assert set(theirs) == heads | backbone
    assert from_mmseg(theirs).keys() == own.keys()
    assert theirs["decode_head.fpn_bottleneck.conv.weight"].shape == (512, 2048, 3, 3)
    channels = own["backbone.model.stages.2.blocks.0.pw1.conv.weight"].shape[1]
    assert theirs["auxiliary_head.convs.0.conv.weight"].shape == (256, channels, 3, 3)


def test_a_checkpoint_of_mmsegmentation_loads(tmp_path):
    model = small()
    file = tmp_path / "iter_160000.pth"
    torch.save({"meta": {"iter": 160_000}, "state_dict": to_mmseg(model.state_dict())}, file)
    other = build(channels=16, auxiliary_channels=8).eval()
    load_checkpoint(other, file)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"not fit UperNet: .*decode_head\.classifier\.weight is \[5, 16, 1, 1\]"):
        load_checkpoint(build(classes=7, channels=16, auxiliary_channels=8), file)


def test_logits_have_the_size_of_the_image():
    model = small()
    x = torch.randn(2, 3, 45, 70)
    with torch.inference_mode():
        logits, auxiliary = model(x, auxiliary=True)
        assert logits.shape == auxiliary.shape == (2, 5, 45, 70)
        assert torch.equal(model(x), logits)
        assert torch.equal(without_auxiliary(small())(x), logits)
        # with corners aligned those are the head's own
        aligned = small(align_corners=True)
        head = aligned.decode_head(aligned.backbone(x))
        torch.testing.assert_close(aligned(x)[..., 0, 0], head[..., 0, 0])


def test_channels_are_dropped_in_training_only():
    model = small()
    features = model.backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.decode_head(features), model.decode_head(features))
    model.decode_head.classifier.train()
    assert not torch.equal(model.decode_head(features), model.decode_head(features))


@pytest.mark.parametrize("name", ["replknet_test", "replknet_cifar_l", "mobilenetv2_lk", "resnet18"])
def test_it_takes_any_backbone(name):
    model = build(name, channels=8, auxiliary_channels=None).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_merged_it_gives_the_same():
    model = small()
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        _, relative = largest_difference(model(x), replknet.merge(model)(x))
        _, exact = largest_difference(model.double()(x.double()), replknet.merge(model)(x.double()))
    assert relative < 2e-5
    assert exact < 1e-10
