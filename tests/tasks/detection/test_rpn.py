"""The pyramids, their batch, and region proposals: anchors, assignment, losses and proposals worked out by hand."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import replknet  # noqa: F401  # registers its models with timm
from replknet.tasks.detection.batches import batched, objects
from replknet.tasks.detection.pyramid import Pyramid
from replknet.tasks.detection.rpn import BACKGROUND, IGNORED, Anchors, BoxCoder, RegionProposals, assigned

STRIDES = (4, 8, 16, 32, 64)


def levels(height, width, channels=8):
    return [torch.randn(1, channels, -(-height // stride), -(-width // stride)) for stride in STRIDES]


def images(*sizes):
    return ImageList(*batched([torch.zeros(3, *size) for size in sizes]))


def proposer(channels=8):
    rpn = RegionProposals(STRIDES, channels)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return rpn


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


# ---- the batch and the pyramid


def test_a_batch_is_filled_up_with_zeros_at_the_right_and_the_bottom():
    given = [torch.ones(3, 40, 70), torch.full((3, 64, 33), 2.0)]
    x, sizes = batched(given)
    assert x.shape == (2, 3, 64, 96)
    assert sizes == [(40, 70), (64, 33)]
    assert x.is_contiguous(memory_format=torch.channels_last)
    for got, image, (height, width) in zip(x, given, sizes, strict=True):
        assert torch.equal(got[:, :height, :width], image)
        assert got.sum() == image.sum()
    assert batched(given, divisor=1)[0].shape == (2, 3, 64, 70)


def test_an_image_of_another_form_is_named():
    with pytest.raises(ValueError, match=r"expected images \[3,H,W\], got \[1, 8, 8\]"):
        batched([torch.zeros(1, 8, 8)])
    with pytest.raises(ValueError, match="expected at least one image"):
        batched([])


@pytest.mark.parametrize(
    ("finest", "extra", "strides"), [(4, "pool", (4, 8, 16, 32, 64)), (8, "convs", (8, 16, 32, 64, 128))]
)
def test_a_level_has_the_image_divided_by_its_stride(finest, extra, strides):
    backbone = timm.create_model("replknet_test", features_only=True)
    pyramid = Pyramid(backbone, finest, 16, extra)
    assert pyramid.strides == strides
    got = [tuple(level.shape) for level in pyramid(torch.randn(2, 3, 96, 160))]
    assert got == [(2, 16, math.ceil(96 / stride), math.ceil(160 / stride)) for stride in strides]
    neck = {key.removeprefix("neck.") for key in pyramid.state_dict() if key.startswith("neck.")}
    names = {f"{part}.{i}.0" for part in ("inner_blocks", "layer_blocks") for i in range(4 if finest == 4 else 3)}
    names |= {"extra_blocks.p6", "extra_blocks.p7"} if extra == "convs" else set()
    assert neck == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_features_finer_than_the_pyramid_are_left_out():
    assert Pyramid(timm.create_model("resnet18", features_only=True), 4, 8).strides == (4, 8, 16, 32, 64)
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 3))
    with pytest.raises(ValueError, match=r"features of strides 4, 8 and so on, got \[4, 16\]"):
        Pyramid(backbone, 4, 8)


def test_levels_are_sums_of_what_the_backbone_found():
    backbone = timm.create_model("replknet_test", features_only=True)
    pyramid = Pyramid(backbone, 8, 8, "convs").eval()
    x = torch.randn(1, 3, 64, 64)
    weights = pyramid.neck.state_dict()

    def conv(name, x, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    sides = [conv(f"inner_blocks.{i}.0", feature) for i, feature in enumerate(backbone(x)[1:])]
    for i in (1, 0):
        sides[i] = sides[i] + sides[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = [conv(f"layer_blocks.{i}.0", side, padding=1) for i, side in enumerate(sides)]
    wanted.append(conv("extra_blocks.p6", wanted[-1], stride=2, padding=1))
    wanted.append(conv("extra_blocks.p7", wanted[-1].relu(), stride=2, padding=1))
    for got, level in zip(pyramid(x), wanted, strict=True):
        torch.testing.assert_close(got, level, rtol=1e-4, atol=1e-5)


# ---- anchors


def test_anchors_stand_on_multiples_of_the_stride_and_are_not_rounded():
    features = [torch.zeros(1, 1, 2, 3)]
    (found,) = Anchors((4,))(images((8, 12)), features)
    assert found.shape == (18, 4)
    # sides 32 / sqrt(ratio) and 32 * sqrt(ratio); the ratio is height to width
    wide, narrow = 32 * math.sqrt(2) / 2, 32 / math.sqrt(2) / 2
    first = [[-wide, -narrow, wide, narrow], [-16, -16, 16, 16], [-narrow, -wide, narrow, wide]]
    torch.testing.assert_close(found[:3], torch.tensor(first))
    torch.testing.assert_close(found[3:6], torch.tensor(first) + torch.tensor([4.0, 0, 4, 0]))
    torch.testing.assert_close(found[9:12], torch.tensor(first) + torch.tensor([0, 4.0, 0, 4]))


def test_the_stride_of_an_odd_grid_stays_what_it_is():
    # 800 pixels are 25 rows of 32, and 13 of the pooled level
    batch = images((800, 800))
    (found,) = Anchors((64,))(batch, [torch.zeros(1, 1, 13, 13)])
    assert found[-2].tolist() == [12 * 64 - 256, 12 * 64 - 256, 12 * 64 + 256, 12 * 64 + 256]
    (theirs,) = AnchorGenerator(((512,),), ((0.5, 1.0, 2.0),))(batch, [torch.zeros(1, 1, 13, 13)])
    assert theirs[-2].tolist()[0] == 12 * 61 - 256


def test_anchors_are_float32_whatever_the_levels_are():
    (found,) = Anchors((4,))(images((8, 12)), [torch.zeros(1, 1, 2, 3, dtype=torch.bfloat16)])
    assert found.dtype == torch.float32


# ---- assignment


def test_boxes_are_assigned_by_their_best_iou():
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 6.9], [0, 0, 10, 3], [0, 0, 10, 2.9], [20, 0, 30, 9]])
    assert assigned(boxes, truth, 0.3, 0.7).tolist() == [0, IGNORED, IGNORED, BACKGROUND, 1]
    assert assigned(boxes, truth, 0.5, 0.5).tolist() == [0, 0, BACKGROUND, BACKGROUND, 1]


def test_an_object_without_a_good_box_gets_its_best_ones_if_they_are_fair():
    truth = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10], [90, 0, 100, 10]])
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 4],  # 0.4 of the first
            [0, 6, 10, 10],  # the same
            [0, 0, 10, 3.5],  # less
            [50, 0, 60, 3],  # 0.3 of the second: just fair
            [90, 0, 100, 2],  # 0.2 of the third: torchvision takes it
        ]
    )
    assert assigned(boxes, truth, 0.3, 0.7, rescue=0.3).tolist() == [0, 0, IGNORED, 1, BACKGROUND]
    assert assigned(boxes, truth, 0.3, 0.7).tolist() == [IGNORED] * 4 + [BACKGROUND]


def test_a_box_that_is_the_best_of_two_objects_goes_to_the_last():
    truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    # 0.8 of the first, 5 / 8 of the second
    assert assigned(torch.tensor([[0.0, 0, 10, 8]]), truth, 0.3, 0.7).tolist() == [0]
    assert assigned(torch.tensor([[0.0, 0, 10, 8]]), truth, 0.3, 0.7, rescue=0.3).tolist() == [1]


def test_without_objects_all_is_background():
    assert assigned(torch.rand(3, 4), torch.zeros(0, 4), 0.3, 0.7, rescue=0.3).tolist() == [BACKGROUND] * 3
    assert assigned(torch.zeros(0, 4), torch.rand(2, 4), 0.3, 0.7, rescue=0.3).shape == (0,)


def test_a_box_without_an_area_is_background():
    point = torch.tensor([[5.0, 5, 5, 5]])
    assert assigned(point, point, 0.5, 0.5).tolist() == [BACKGROUND]


def test_anchors_over_the_border_of_their_image_are_ignored():
    rpn = proposer()
    boxes = torch.tensor(
        [[0.0, 0, 20, 20], [-0.1, 0, 20, 20], [0, -0.1, 20, 20], [0, 0, 39.9, 29.9], [0, 0, 40, 20], [0, 0, 20, 30]]
    )
    target = {"boxes": torch.zeros(0, 4), "size": torch.tensor([30, 40])}
    (labels,), _ = rpn.assign_targets_to_anchors([boxes], [target])
    assert labels.tolist() == [0, -1, -1, 0, -1, -1]
    # the best anchor of an object is the best of those inside
    target["boxes"] = torch.tensor([[0.0, 0, 20, 30]])
    (labels,), (matched,) = rpn.assign_targets_to_anchors([boxes], [target])
    # IoU 400 / 600 and 600 / 1193
    assert labels.tolist() == [1, -1, -1, -1, -1, -1]
    assert matched[0].tolist() == [0, 0, 20, 30]


# ---- boxes as differences


def test_differences_are_decoded_as_the_papers():
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    # the centre (20, 40) moves by a tenth of 20 and of 40; the width doubles, the height halves
    differences = torch.tensor([[1.0, -1, math.log(2) / 0.2, -math.log(2) / 0.2]])
    got = coder.decode_single(differences, torch.tensor([[10.0, 20, 30, 60]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 26, 42, 46]]))
    back = coder.encode_single(got, torch.tensor([[10.0, 20, 30, 60]]))
    torch.testing.assert_close(back, differences)


def test_growing_and_shrinking_are_limited_alike():
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    box = torch.tensor([[0.0, 0, 16, 16]])
    large, small = (coder.decode_single(torch.tensor([[0, 0, d, d]]), box)[0] for d in (1e4, -1e4))
    assert (large[2] - large[0]).item() == pytest.approx(1000, rel=1e-5)
    assert (small[2] - small[0]).item() == pytest.approx(0.256, rel=1e-4)


def test_bfloat16_differences_are_decoded_in_float32():
    got = BoxCoder().decode_single(torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([[1001.0, 0, 1333, 801]]))
    assert got.tolist() == [[1001, 0, 1333, 801]]


# ---- losses and proposals


def test_losses_are_those_worked_out_anchor_by_anchor():
    rpn = proposer().train()
    features, batch = levels(64, 96), images((60, 90))
    truth = torch.tensor([[10.0, 12, 45, 40], [50, 20, 85, 55], [3, 3, 8, 9]])
    _, losses = rpn(batch, features, [{"boxes": truth}])

    logits, differences = rpn.head(features)
    inside = []
    for stride, level, moved in zip(STRIDES, logits, differences, strict=True):
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                for i, ratio in enumerate((0.5, 1.0, 2.0)):
                    width, height = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                    if box[0] >= 0 and box[1] >= 0 and box[2] < 90 and box[3] < 60:
                        found = moved[0, 4 * i : 4 * i + 4, row, column].tolist()
                        inside.append((box, level[0, i, row, column].item(), found))
    table = [[iou(box, own) for own in truth.tolist()] for box, _, _ in inside]
    highest = [max(column) for column in zip(*table, strict=True)]
    owners = []
    for row in table:
        owner = row.index(max(row)) if max(row) >= 0.7 else (BACKGROUND if max(row) < 0.3 else IGNORED)
        for i, value in enumerate(row):
            if highest[i] >= 0.3 and abs(value - highest[i]) < 1e-6:
                owner = i
        owners.append(owner)
    counted = [owner for owner in owners if owner != IGNORED]
    # so few that every one of them is sampled
    assert len(counted) <= 256
    assert 2 <= sum(owner >= 0 for owner in counted) <= 128
    assert highest[2] < 0.3
    entropy = smooth = 0.0
    for (box, logit, found), owner in zip(inside, owners, strict=True):
        if owner == IGNORED:
            continue
        entropy += math.log1p(math.exp(-logit if owner >= 0 else logit))
        if owner >= 0:
            a, b = box, truth[owner].tolist()
            sides = (a[2] - a[0], a[3] - a[1])
            wanted = [((b[k] + b[k + 2]) - (a[k] + a[k + 2])) / 2 / sides[k] for k in (0, 1)]
            wanted += [math.log((b[k + 2] - b[k]) / sides[k]) for k in (0, 1)]
            for got, want in zip(found, wanted, strict=True):
                error = abs(got - want)
                smooth += error - 1 / 18 if error > 1 / 9 else error**2 * 4.5
    assert losses["loss_rpn_cls"].item() == pytest.approx(entropy / len(counted), rel=1e-4)
    assert losses["loss_rpn_box"].item() == pytest.approx(smooth / len(counted), rel=1e-4)


def test_proposals_are_those_worked_out_box_by_box():
    rpn = proposer().eval()
    features, batch = levels(64, 96), images((60, 90))
    (got,), losses = rpn(batch, features)
    assert losses == {}
    logits, differences = rpn.head(features)
    (anchors,) = rpn.anchor_generator(batch, features)
    boxes, start = [], 0
    for level, moved in zip(logits, differences, strict=True):
        scores = level[0].permute(1, 2, 0).flatten().tolist()
        moves = moved[0].permute(1, 2, 0).reshape(-1, 4).tolist()
        best = sorted(zip(scores, moves, anchors[start : start + len(scores)].tolist(), strict=True), reverse=True)
        start += len(scores)
        kept = []
        for score, (dx, dy, dw, dh), (x1, y1, x2, y2) in best[:1000]:
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            width, height = (x2 - x1) * math.exp(dw) / 2, (y2 - y1) * math.exp(dh) / 2
            sides = zip((x - width, y - height, x + width, y + height), (90, 60, 90, 60), strict=True)
            box = [min(max(side, 0.0), end) for side, end in sides]
            if box[2] - box[0] >= 1e-3 and box[3] - box[1] >= 1e-3 and all(iou(box, own) <= 0.7 for _, own in kept):
                kept.append((score, box))
        boxes += kept
    wanted = torch.tensor([box for _, box in sorted(boxes, reverse=True)])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_training_proposes_two_thousand_boxes_and_use_one_thousand():
    rpn = proposer()
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=1e-3)
    batch, features = images((400, 1200)), levels(416, 1216)
    (trained,), _ = rpn.train()(batch, features, [{"boxes": torch.zeros(0, 4)}])
    (used,), _ = rpn.eval()(batch, features)
    assert (len(trained), len(used)) == (2000, 1000)
    assert not trained.requires_grad


def test_an_image_that_no_anchor_fits_into_gives_losses_of_zero_with_gradients():
    rpn = proposer().train()
    batch, features = images((12, 12)), levels(32, 32)
    boxes, losses = rpn(batch, features, [{"boxes": torch.tensor([[2.0, 2, 9, 9]])}])
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())
    assert boxes[0].shape[0] > 0


def test_an_image_without_proposals_is_one_itself():
    rpn = proposer().eval()
    torch.nn.init.constant_(rpn.head.bbox_pred.bias, 1e4)
    (boxes,), _ = rpn(images((50, 70)), levels(64, 96))
    assert boxes.tolist() == [[0, 0, 70, 50]]


# ---- what is to be found


def test_crowds_and_boxes_without_an_area_are_not_to_be_found():
    boxes = torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9], [3, 3, 3, 8], [2, 2, 3, 3]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([4, 5, 6, 7]),
        "masks": torch.arange(4, dtype=torch.uint8)[:, None, None].expand(4, 2, 2),
        "crowd": torch.tensor([False, True, False, False]),
    }
    (found,) = objects([torch.zeros(3, 8, 8)], [target], masks=True)
    assert found["labels"].tolist() == [4, 7]
    assert found["masks"][:, 0, 0].tolist() == [0, 3]
    assert torch.equal(found["boxes"], boxes[[0, 3]])
    assert set(objects([torch.zeros(3, 8, 8)], [target], masks=False)[0]) == {"boxes", "labels"}


def test_what_is_missing_in_targets_is_named():
    image, target = torch.zeros(3, 8, 8), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    with pytest.raises(ValueError, match="expected 1, got none"):
        objects([image], None, masks=False)
    with pytest.raises(ValueError, match="expected 2, got 1"):
        objects([image] * 2, [target], masks=False)
    with pytest.raises(ValueError, match="boxes, labels, masks, got one without masks"):
        objects([image], [target], masks=True)
