"""Segmentation: windows as mmsegmentation's, scores by hand and by brute force, and networks in files."""

import math
import weakref

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import replknet
from replknet.data.masks import IGNORE, shipped_classes
from replknet.data.transforms import IMAGENET_MEAN, INCEPTION_MEAN
from replknet.models import CheckpointError, load_model
from replknet.models.key_formats import to_mmseg, to_official
from replknet.tasks.segmentation.files import (
    SegmentationDescription,
    described,
    load_segmentation,
    save_segmentation,
)
from replknet.tasks.segmentation.heads import UperNet
from replknet.tasks.segmentation.infer import Inference, confusion_of, evaluate, scores
from replknet.tasks.segmentation.train import Segmentation

DESCRIPTION = SegmentationDescription(
    backbone="replknet_test",
    network={"kernels": (5, 5, 5, 5), "small_kernel": 3},
    classes=("sky", "road", "car"),
    palette=((0, 0, 255), (90, 90, 90), (255, 0, 0)),
    channels=16,
    auxiliary_channels=8,
    align_corners=False,
    scale=(128, 64),
    window=None,
    stride=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


class Net(nn.Module):
    """Sees what lies around a pixel, so that a window's place matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 9, padding=4)

    def forward(self, x):
        return self.conv(x)


def mmseg_slide(model, x, crop, stride):
    """Windows as mmsegmentation places them, one by one."""
    height, width = x.shape[-2:]
    total, count = 0.0, torch.zeros(1, 1, height, width)
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            part = model(x[:, :, top:bottom, left:right])
            around = (left, width - right, top, height - bottom)
            total, count = total + F.pad(part, around), count + F.pad(torch.ones_like(part[:1, :1]), around)
    return total / count


@pytest.mark.parametrize(("window", "stride"), [(64, 43), (64, 42), (30, 20), (32, 32), (17, 5)])
@pytest.mark.parametrize("size", [(64, 64), (65, 100), (40, 90), (20, 25), (128, 64)])
def test_windows_are_those_of_mmsegmentation(size, window, stride):
    model, x = Net(), torch.randn(1, 3, *size)
    with torch.inference_mode():
        found = Inference(window=window, stride=stride).logits(model, x)
        torch.testing.assert_close(found, mmseg_slide(model, x, window, stride), rtol=1e-5, atol=1e-5)


def test_the_whole_image_at_the_size_of_its_mask():
    model, x = Net(), torch.randn(1, 3, 20, 30)
    found = Inference()(model, x, (40, 60))
    expected = F.interpolate(model(x), size=(40, 60), mode="bilinear").argmax(1)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), expected)


def test_an_image_is_fitted_into_the_scale():
    model, x = Net(), torch.randn(1, 3, 40, 60)
    # twice the size, since the shorter side decides; of ratios, too
    for ratio, size in ((1.0, (80, 120)), (0.5, (40, 60))):
        scaled = F.interpolate(x, size=size, mode="bilinear")
        expected = F.interpolate(model(scaled), size=(40, 60), mode="bilinear").argmax(1)
        found = Inference(ratios=(ratio,), scale=(300, 80))(model, x, (40, 60))
        assert torch.equal(found.long(), expected)


def test_scales_and_mirror_average_probabilities():
    model, x = Net(), torch.randn(1, 3, 20, 30)
    total = 0.0
    for ratio in (0.5, 1.5):
        scaled = F.interpolate(x, size=(int(20 * ratio), int(30 * ratio)), mode="bilinear")
        for mirrored in (False, True):
            logits = model(scaled.flip(-1) if mirrored else scaled)
            logits = F.interpolate(logits, size=(20, 30), mode="bilinear")
            total = total + (logits.flip(-1) if mirrored else logits).softmax(1)
    found = Inference(ratios=(0.5, 1.5), flip=True)(model, x, (20, 30))
    assert torch.equal(found.long(), total.argmax(1))


def test_an_inference_that_cannot_be_is_an_error():
    for options, text in (
        ({"window": 64}, "stride must be from 1 to the window's 64, got None"),
        ({"window": 64, "stride": 65}, "stride must be from 1 to the window's 64, got 65"),
        ({"ratios": ()}, r"ratios must be positive, got \(\)"),
    ):
        with pytest.raises(ValueError, match=text):
            Inference(**options)


def test_scores_by_hand():
    mask = torch.tensor([[0, 0, 1, 1, IGNORE, 2]])
    predicted = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.uint8)
    found = scores(confusion_of(predicted, mask.to(torch.uint8), 4), 1)
    # class 0: 1 of {0, 0, the last}; class 1: 2 of {1, 1, the second 0}; class 2: never found; class 3: nowhere
    assert found.iou == [1 / 3, 2 / 3, 0.0, None]
    assert found.miou == pytest.approx(1 / 3)
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.class_accuracy == [0.5, 1.0, 0.0, None]
    assert found.mean_accuracy == 0.5
    assert found.confusion == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert math.isnan(scores(torch.zeros(2, 2, dtype=torch.int64), 0).miou)


def test_scores_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    classes, batches = 5, []
    for height, width in ((13, 17), (9, 30), (1, 1)):
        mask = torch.randint(0, classes - 1, (1, height, width), generator=generator).to(torch.uint8)
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = IGNORE
        batches.append((torch.randn(1, 3, height, width, generator=generator), mask))
    model = Net()
    model.conv = nn.Conv2d(3, classes, 1)
    found = evaluate(model, batches, classes, Inference())
    inside, either = [0] * classes, [0] * classes
    for x, mask in batches:
        predicted = model(x).argmax(1)
        for p, t in zip(predicted.flatten().tolist(), mask.flatten().tolist(), strict=True):
            if t == IGNORE:
                continue
            for c in range(classes):
                inside[c] += p == c and t == c
                either[c] += p == c or t == c
    iou = [a / b for a, b in zip(inside, either, strict=True) if b]
    assert found.images == 3
    assert found.miou == pytest.approx(sum(iou) / len(iou), abs=1e-12)
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(model, [], classes, Inference())


def test_what_was_predicted_for_large_images_is_not_kept():
    # so memory is that of one image, however many there are
    alive = []

    def model(x):
        assert not [logits for logits in (ref() for ref in alive) if logits is not None]
        logits = x[:, :2].contiguous()
        alive.append(weakref.ref(logits))
        return logits

    model.eval = lambda: model
    batches = ((torch.rand(1, 3, 1024, 2048), torch.zeros(1, 1024, 2048, dtype=torch.uint8)) for _ in range(3))
    assert evaluate(model, batches, 2, Inference()).images == len(alive) == 3


def test_saved_it_comes_back_in_its_form(tmp_path):
    model = DESCRIPTION.build().eval()
    x = torch.randn(1, 3, 64, 96)
    for form in (model, replknet.merge(model, fold_bn=False), replknet.merge(model)):
        save_segmentation(form, tmp_path / "m.safetensors", DESCRIPTION)
        loaded, description = load_segmentation(tmp_path / "m.safetensors")
        assert description.build().decode_head.channels == 16
        assert (description.classes, description.palette, description.scale) == (
            DESCRIPTION.classes, DESCRIPTION.palette, (128, 64),
        )  # fmt: skip
        assert loaded.auxiliary_head is None
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x), form(x))
    with pytest.raises(CheckpointError, match="holds no classifier but a network for segmentation"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds no UperNet over a RepLKNet: expected keys such as decode_head"):
        load_segmentation("replknet_cifar_l")


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("replknet_31b", 150, ("replknet_31b", {}, (2048, 512), False, None, IMAGENET_MEAN)),
        ("replknet_31b", 19, ("replknet_31b", {}, (2049, 1025), True, None, IMAGENET_MEAN)),
        ("replknet_31l", 150, ("replknet_31l", {}, (2048, 512), False, 640, IMAGENET_MEAN)),
        (
            "replknet_xl",
            150,
            ("replknet_xl", {"norm_intermediate_features": True}, (2048, 512), False, 640, INCEPTION_MEAN),
        ),
    ],
)
def test_an_official_network_is_understood_from_its_keys(name, classes, expected):
    with torch.device("meta"):
        options = {"norm_intermediate_features": True} if name == "replknet_xl" else {}
        model = UperNet(timm.create_model(name, features_only=True, **options), classes)
    found = described(to_official(to_mmseg(model.state_dict())))
    assert (found.backbone, found.network, found.scale, found.align_corners, found.window, found.mean) == expected
    assert (found.channels, found.auxiliary_channels, len(found.classes)) == (512, 256, classes)
    assert found.classes == shipped_classes("ade20k" if classes == 150 else "cityscapes").names


def test_a_file_of_mmsegmentation_is_a_network(tmp_path):
    torch.manual_seed(0)
    model = UperNet(timm.create_model("replknet_test", features_only=True), 19, 16, 8, align_corners=True).eval()
    x, file = torch.randn(1, 3, 64, 96), tmp_path / "iter_80000.pth"
    for form in (model, replknet.merge(model, fold_bn=False), replknet.merge(model)):
        torch.save({"meta": {"iter": 80_000}, "state_dict": to_mmseg(form.state_dict())}, file)
        loaded, description = load_segmentation(file)
        assert (description.backbone, description.classes[0]) == ("replknet_test", "road")
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x), form(x))
    other = UperNet(
        timm.create_model("replknet_test", features_only=True, kernels=(5, 5, 3, 3), small_kernel=3), 19, 16
    )
    torch.save(to_mmseg(other.state_dict()), file)
    _, description = load_segmentation(file)
    assert (description.backbone, description.network["kernels"]) == ("replknet_31b", (5, 5, 3, 3))
    torch.save(to_mmseg(UperNet(timm.create_model("replknet_test", features_only=True), 7, 16).state_dict()), file)
    with pytest.raises(CheckpointError, match=r"has 7 classes and does not say which: expected 150, of ADE20K, or 19"):
        load_segmentation(file)
    torch.save({"decode_head.conv_seg.weight": torch.zeros(19, 16, 1, 1)}, file)
    with pytest.raises(CheckpointError, match="holds no UperNet over a RepLKNet"):
        load_segmentation(file)


def test_the_loss_counts_pixels_as_mmsegmentation_does():
    model = DESCRIPTION.build()
    task = Segmentation(model, optimizer="adamw", lr=1.0, warmup_steps=0, weight_decay=0.1, inference=Inference())
    task.log = lambda *args, **kwargs: None
    x, mask = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)).to(torch.uint8)
    mask[:, :32] = IGNORE
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and type(module).__name__ == "_Classifier":
            module.eval()
    loss = task.training_step((x, mask), 0)
    logits, auxiliary = model(x, auxiliary=True)
    each = [F.cross_entropy(y[:, :, 32:], mask[:, 32:].long()).item() / 2 for y in (logits, auxiliary)]
    assert loss.item() == pytest.approx(each[0] + 0.4 * each[1], rel=1e-4)
    nothing = task.training_step((x, torch.full_like(mask, IGNORE)), 0)
    assert nothing.item() == 0


def test_backbone_and_heads_learn_at_their_own_pace():
    task = Segmentation(
        DESCRIPTION.build(), optimizer="adamw", lr=0.1, warmup_steps=4, weight_decay=0.05, backbone_lr=0.5,
        inference=Inference(),
    )  # fmt: skip
    task._trainer = type("T", (), {"estimated_stepping_batches": 8})()
    found = task.configure_optimizers()
    groups = found["optimizer"].param_groups
    assert sorted({(g["initial_lr"], g["weight_decay"]) for g in groups}) == [
        (0.05, 0),
        (0.05, 0.05),
        (0.1, 0),
        (0.1, 0.05),
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(task.model.parameters()))
    assert all(p.ndim == 1 for g in groups if g["weight_decay"] == 0 for p in g["params"])
    (factor, *_) = found["lr_scheduler"]["scheduler"].lr_lambdas
    # linear warm-up from 1e-6 times a line to 0
    assert [factor(step) for step in range(9)] == pytest.approx(
        [1e-6, 7 / 32, 6 / 16, 15 / 32, 0.5, 3 / 8, 2 / 8, 1 / 8, 0]
    )
