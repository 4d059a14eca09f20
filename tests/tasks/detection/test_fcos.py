"""FCOS: targets, losses and boxes by hand and against plain loops, training to the end, and the paper's size."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

import replknet
from replknet.tasks.detection import fcos
from replknet.tasks.detection.fcos import FCOS, Outputs, Points, assigned, centerness_of, losses, points_of
from replknet.tasks.detection.torchvision_detectors import torchvision_fcos

# the paper prints 87.0 M: the merged backbone 78,500,224, the pyramid 3,409,920 and the head 4,918,618; our count
PARAMETERS = 86_828_762

STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))
SIZES = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of the levels of 64x96 pixels
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def build(channels=32, num_classes=3, kind=FCOS):
    torch.manual_seed(0)
    return kind(timm.create_model("replknet_test", features_only=True), num_classes, channels)


def lively(**options):
    """A model whose scores are spread and whose boxes are of all sizes."""
    model = build(**options).eval()
    head = model.bbox_head
    for conv in (head.conv_cls, head.conv_reg, head.conv_centerness):
        torch.nn.init.normal_(conv.weight, std=0.1)
    torch.nn.init.constant_(head.conv_cls.bias, -2)
    torch.nn.init.constant_(head.conv_reg.bias, 2)
    for i, scale in enumerate(head.scales):
        torch.nn.init.constant_(scale.scale, 1 + 0.2 * i)
    return model


def target(*boxes, labels=None, **more):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor(labels or [0] * len(boxes)),
        **more,
    }


def single(x, y, level):
    return Points(torch.tensor([[float(x), float(y)]]), torch.tensor([RANGES[level]]), [1])


# ---- points and targets


def test_points_are_in_the_middle_of_their_cells():
    points = points_of(SIZES)
    assert points.counts == [96, 24, 6, 2, 1]
    assert points.xy[:3].tolist() == [[4, 4], [12, 4], [20, 4]]
    assert points.xy[12].tolist() == [4, 12]
    assert points.xy[96:98].tolist() == [[8, 8], [24, 8]]
    assert points.xy[-3:].tolist() == [[32, 32], [96, 32], [64, 64]]
    assert points.ranges[[0, 95, 96, 128]].tolist() == [[-1, 64], [-1, 64], [64, 128], [512, 1e8]]


def test_a_point_on_a_side_is_not_inside():
    points = points_of(SIZES)
    labels, distances = assigned(points, torch.tensor([[4.0, 4, 20, 28]]), torch.tensor([2]))
    inside = (labels >= 0).nonzero().flatten().tolist()
    # of the columns 4, 12, 20 and the rows 4, 12, 20, 28 only these
    assert points.xy[inside].tolist() == [[12, 12], [12, 20]]
    assert labels[inside].tolist() == [2, 2]
    assert distances[inside].tolist() == [[8, 8, 8, 16], [8, 16, 8, 8]]


@pytest.mark.parametrize(
    ("x", "levels"), [(63, [1]), (64, [0, 1]), (65, [1]), (66, [1])], ids=["63", "at the limit", "65", "66"]
)
def test_the_furthest_side_decides_the_level_and_limits_belong_to_both(x, levels):
    box = torch.tensor([[0.0, 0, 128, 100]])
    found = [level for level in range(5) if assigned(single(x, 50, level), box, torch.tensor([0]))[0] >= 0]
    assert found == levels


def test_the_smallest_box_of_the_level_wins():
    large, small, tiny = [0.0, 0, 120, 120], [10.0, 10, 110, 110], [50.0, 50, 60, 60]
    boxes, labels = torch.tensor([large, small, tiny]), torch.tensor([0, 1, 2])
    # 55 is the distance in the small box, 65 in the large one
    assert assigned(single(55, 55, 0), boxes, labels)[0] == 2
    assert assigned(single(55, 55, 0), boxes[:2], labels[:2])[0] == 1
    assert assigned(single(55, 55, 1), boxes, labels)[0] == 0
    assert assigned(single(55, 55, 2), boxes, labels)[0] == -1


def test_targets_are_those_of_plain_loops():
    sizes = [(-(-256 // stride), -(-384 // stride)) for stride in STRIDES]
    corner = torch.rand(12, 2) * torch.tensor([300.0, 200])
    boxes = torch.cat([corner, corner + torch.rand(12, 2) ** 2 * 300 + 1], 1)
    labels, distances = assigned(points_of(sizes), boxes, torch.arange(12))
    place = 0
    for (height, width), stride, (low, high) in zip(sizes, STRIDES, RANGES, strict=True):
        for row in range(height):
            for column in range(width):
                x, y = column * stride + stride // 2, row * stride + stride // 2
                best, best_area, best_sides = -1, math.inf, None
                for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    area = (x2 - x1) * (y2 - y1)
                    if min(sides) > 0 and low <= max(sides) <= high and area < best_area:
                        best, best_area, best_sides = i, area, sides
                assert labels[place] == best
                assert best < 0 or distances[place].tolist() == pytest.approx(best_sides, abs=1e-4)
                place += 1
    assert place == len(labels)
    assert len(set(labels.tolist())) > 6


def test_a_box_of_one_pixel_is_found_by_the_point_in_it_alone():
    points = points_of(SIZES)
    labels, _ = assigned(points, torch.tensor([[11.5, 11.5, 12.5, 12.5], [13, 13, 14, 14]]), torch.tensor([0, 1]))
    assert points.xy[labels >= 0].tolist() == [[12, 12]]


def test_centerness_by_hand():
    distances = torch.tensor([[5.0, 5, 5, 5], [1, 2, 4, 2], [1, 9, 4, 4]])
    assert centerness_of(distances).tolist() == pytest.approx([1, 0.5, 1 / 3])


# ---- losses


def outputs(logits, distances, centerness):
    return Outputs(torch.tensor([logits]), torch.tensor([distances]), torch.tensor([centerness]))


def focal(logit, wanted):
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if wanted else -0.75 * p**2 * math.log(1 - p)


# two points with objects and one without, of two classes
LABELS = torch.tensor([[1, -1, 0]])
AIMS = torch.tensor([[[4.0, 4, 4, 4], [9, 9, 9, 9], [1, 2, 4, 2]]])
SAID = outputs([[-1.0, 2], [0.5, -3], [1, 0]], [[2.0, 4, 4, 4], [7, 7, 7, 7], [1, 2, 4, 4]], [0.3, 5.0, -0.7])


def test_focal_loss_by_hand():
    terms = [focal(-1, False), focal(2, True), focal(0.5, False), focal(-3, False), focal(1, True), focal(0, False)]
    assert losses(SAID, LABELS, AIMS)["loss_cls"].item() == pytest.approx(sum(terms) / 2)


def test_box_loss_by_hand():
    # 6x8 of 8x8 with weight 1; 5x4 of 5x6 with weight 1/2
    expected = (-math.log(48 / 64) - 0.5 * math.log(20 / 30)) / 1.5
    assert losses(SAID, LABELS, AIMS)["loss_bbox"].item() == pytest.approx(expected)


def test_centerness_loss_by_hand():
    def entropy(logit, aim):
        p = 1 / (1 + math.exp(-logit))
        return -aim * math.log(p) - (1 - aim) * math.log(1 - p)

    expected = (entropy(0.3, 1) + entropy(-0.7, 0.5)) / 2
    assert losses(SAID, LABELS, AIMS)["loss_centerness"].item() == pytest.approx(expected)


def test_the_loss_of_a_box_has_an_end():
    far = outputs([[0.0, 0]], [[1e-9, 1e-9, 1e-9, 1e-9]], [0.0])
    found = losses(far, torch.tensor([[0]]), torch.full((1, 1, 4), 4.0))
    assert found["loss_bbox"].item() == pytest.approx(-math.log(1e-6))


def test_without_objects_the_classes_alone_are_learned():
    found = losses(SAID, torch.full((1, 3), -1), AIMS)
    assert found["loss_bbox"] == found["loss_centerness"] == 0
    expected = sum(focal(logit, False) for logit in (-1, 2, 0.5, -3, 1, 0))
    assert found["loss_cls"].item() == pytest.approx(expected)


def test_losses_are_divided_by_the_mean_of_all_processes(monkeypatch):
    alone = losses(SAID, LABELS, AIMS)
    # the other process has six points with an object, whose centerness adds up to 4.5: means are 4 and 3
    monkeypatch.setattr(fcos.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fcos.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(fcos.dist, "all_reduce", lambda x: x.add_(torch.tensor([6, 4.5]) / 2))
    together = losses(SAID, LABELS, AIMS)
    for name, factor in (("loss_cls", 2), ("loss_bbox", 2), ("loss_centerness", 2)):
        torch.testing.assert_close(together[name], alone[name] / factor)


# ---- boxes


def slow_head(model, x):
    """Class logits, distances and centerness logits of each level, from the weights alone."""
    weights = model.bbox_head.state_dict()

    def tower(name, x):
        for i in range(4):
            x = F.conv2d(x, weights[f"{name}.{i}.conv.weight"], padding=1)
            x = F.relu(F.group_norm(x, 16, weights[f"{name}.{i}.gn.weight"], weights[f"{name}.{i}.gn.bias"]))
        return x

    def last(name, x):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    for i, level in enumerate(model.pyramid(x)):
        classes = tower("cls_convs", level)
        sides = torch.exp(last("conv_reg", tower("reg_convs", level)) * weights[f"scales.{i}.scale"])
        yield last("conv_cls", classes), sides, last("conv_centerness", classes)


def iou(a, b):
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height) if areas > width * height else 0


def slow_boxes(levels, size, candidates):
    """(score, label, box) of one image, by loops over points and classes."""
    height, width = size
    found = []
    for (logits, sides, central), stride in zip(levels, STRIDES, strict=True):
        points = []
        for row in range(logits.shape[1]):
            for column in range(logits.shape[2]):
                scores = logits[:, row, column].sigmoid().tolist()
                factor = central[0, row, column].sigmoid().item()
                x, y = column * stride + stride // 2, row * stride + stride // 2
                left, top, right, bottom = sides[:, row, column].tolist()
                box = [max(x - left, 0), max(y - top, 0), min(x + right, width), min(y + bottom, height)]
                box = [min(box[0], width), min(box[1], height), max(box[2], 0), max(box[3], 0)]
                points.append((max(scores) * factor, scores, factor, box))
        points.sort(key=lambda point: -point[0])
        for _, scores, factor, box in points[:candidates]:
            found += [(s * factor, label, box) for label, s in enumerate(scores) if s > 0.05]
    found.sort(key=lambda detection: -detection[0])
    kept = []
    for score, label, box in found:
        if all(other != label or iou(box, rival) <= 0.5 for _, other, rival in kept):
            kept.append((score, label, box))
    return kept[:100]


@pytest.mark.parametrize("candidates", [1000, 10])
def test_boxes_are_those_of_plain_loops(candidates, monkeypatch):
    monkeypatch.setattr(fcos, "_CANDIDATES", candidates)
    model = lively()
    images = [torch.randn(3, 64, 96), torch.randn(3, 50, 70)]
    x = torch.zeros(2, 3, 64, 96)
    x[0], x[1, :, :50, :70] = images
    with torch.inference_mode():
        found = model(images)
        levels = list(slow_head(model, x))
    for i, (detections, size) in enumerate(zip(found, ((64, 96), (50, 70)), strict=True)):
        expected = slow_boxes([[part[i] for part in level] for level in levels], size, candidates)
        assert len(expected) > 10
        assert detections["labels"].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(detections["scores"], torch.tensor([score for score, _, _ in expected]))
        torch.testing.assert_close(
            detections["boxes"], torch.tensor([box for _, _, box in expected]), rtol=1e-4, atol=1e-4
        )


def test_at_most_a_hundred_boxes_are_given(monkeypatch):
    model = lively(num_classes=20)
    with torch.inference_mode():
        found = model([torch.randn(3, 64, 96)])[0]
        assert found["boxes"].shape == (100, 4)
        assert found["scores"].sort(descending=True).values.equal(found["scores"])
        # none, too, has its form
        torch.nn.init.constant_(model.bbox_head.conv_cls.bias, -100)
        empty = model([torch.randn(3, 64, 96)])[0]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].dtype == torch.int64


def test_an_image_gets_the_same_alone_and_in_a_batch_of_its_padded_size():
    model = lively()
    images = [torch.randn(3, 64, 96), torch.randn(3, 50, 70)]
    with torch.inference_mode():
        together = model(images)
        for image, found in zip(images, together, strict=True):
            (alone,) = model([image])
            assert found["labels"].equal(alone["labels"])
            for name in ("boxes", "scores"):
                torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-4)


# ---- training


IMAGES = (torch.linspace(-2, 2, 3 * 64 * 96).reshape(3, 64, 96), torch.linspace(2, -1, 3 * 40 * 90).reshape(3, 40, 90))
ONE = target([10.0, 10, 50, 40], [20, 5, 90, 60], labels=[1, 2])


def step(model, targets, images=IMAGES):
    found = model.train()(list(images), targets)
    assert list(found) == ["loss_cls", "loss_bbox", "loss_centerness"]
    for value in found.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
    sum(found.values()).backward()
    return {name: value.item() for name, value in found.items()}


KINDS = pytest.mark.parametrize("kind", [FCOS, torchvision_fcos], ids=["official", "torchvision"])


@KINDS
@pytest.mark.parametrize("targets", [[ONE, ONE], [ONE, NONE], [NONE, NONE]], ids=["two", "one", "none"])
def test_every_parameter_gets_a_gradient_whatever_the_objects(kind, targets):
    model = build(kind=kind)
    step(model, targets)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@KINDS
def test_crowds_and_boxes_without_an_area_are_left_out(kind):
    crowd = target([10.0, 10, 50, 40], [20, 5, 90, 60], [3, 3, 60, 30], labels=[1, 2, 0])
    crowd["crowd"] = torch.tensor([False, False, True])
    flat = target([10.0, 10, 50, 40], [20, 5, 90, 60], [3, 3, 3, 30], labels=[1, 2, 0])
    one = target([10.0, 10, 50, 40], [20, 5, 90, 60], labels=[1, 2], crowd=torch.tensor([False, False]))
    expected = step(build(kind=kind), [ONE, NONE])
    for other in (crowd, flat, one):
        assert step(build(kind=kind), [other, NONE]) == expected
    assert step(build(kind=kind), [{**crowd, "crowd": torch.zeros(3, dtype=torch.bool)}, NONE]) != expected


@KINDS
def test_boxes_of_one_pixel_can_be_trained(kind):
    step(build(kind=kind), [target([11.5, 11.5, 12.5, 12.5]), target([0.0, 0, 1, 1])])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_losses_and_boxes_stay_in_float32(kind, dtype):
    truth = step(build(kind=kind), [ONE, NONE])
    model = build(kind=kind)
    with torch.autocast("cpu", dtype):
        found = step(model, [ONE, NONE])
        assert found == pytest.approx(truth, rel=0.02)
        detections = (lively() if kind is FCOS else model).eval()(IMAGES)
    assert {d[name].dtype for d in detections for name in ("boxes", "scores")} == {torch.float32}


@KINDS
def test_training_needs_one_target_an_image(kind):
    model = build(kind=kind)
    with pytest.raises(ValueError, match="one target for each image: expected 2, got none"):
        model(IMAGES)
    with pytest.raises(ValueError, match="one target for each image: expected 2, got 1"):
        model(IMAGES, [NONE])


def four():
    """Images with one or two plain rectangles, whose colours are their classes."""
    colours = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]])
    targets = [
        target([8.0, 8, 40, 40], labels=[0]),
        target([30.0, 10, 90, 56], labels=[1]),
        target([4.0, 20, 36, 60], [52, 6, 88, 34], labels=[2, 0]),
        target([50.0, 30, 92, 62], labels=[2]),
    ]
    images = []
    for each in targets:
        image = torch.zeros(3, 64, 96)
        for (x1, y1, x2, y2), label in zip(each["boxes"].int().tolist(), each["labels"], strict=True):
            image[:, y1:y2, x1:x2] = colours[label][:, None, None]
        images.append(image)
    return images, targets


def least_centerness_loss(targets):
    """The entropy of the centerness that is to be learned."""
    found = [assigned(points_of(SIZES), each["boxes"], each["labels"]) for each in targets]
    aims = torch.cat([centerness_of(distances[labels >= 0]) for labels, distances in found])
    return F.binary_cross_entropy(aims, aims).item()


@pytest.mark.parametrize("kind", [FCOS, pytest.param(torchvision_fcos, marks=pytest.mark.full)])
def test_four_images_are_learned_by_heart(kind):
    images, targets = four()
    model = build(kind=kind)
    steps = 120
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        found = step(model, targets, images)
        optimiser.step()
        schedule.step()
    assert found["loss_cls"] < 0.02
    assert found["loss_bbox"] < 0.2
    if kind is FCOS:
        assert 0 < found["loss_centerness"] - least_centerness_loss(targets) < 0.02
    with torch.inference_mode():
        detections = model.eval()(images)
    for said, truth in zip(detections, targets, strict=True):
        best = box_iou(truth["boxes"], said["boxes"][: len(truth["boxes"])])
        assert best.amax(1).min() > 0.75
        assert said["labels"][best.argmax(1)].equal(truth["labels"])
        assert said["scores"][: len(truth["boxes"])].min() > 0.4


# ---- the network


def papers():
    with torch.device("meta"):
        model = FCOS(timm.create_model("replknet_31b", features_only=True), 80)
    return replknet.merge(model, fold_bn=False)


def test_parameters_are_the_papers():
    assert sum(p.numel() for p in papers().parameters()) == PARAMETERS


def test_multiply_adds_are_the_papers():
    # 437 G at 800x1280, counted with the norms, which are about a hundredth
    model = papers().eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.inference_mode():
        model.bbox_head(model.pyramid(torch.empty(1, 3, 800, 1280)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(432.6, abs=0.1)


def test_merged_it_says_the_same():
    model = lively()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 3, 64, 96)
    merged = replknet.merge(model)
    with torch.inference_mode():
        truth, found = (m.bbox_head(m.pyramid(x)) for m in (model, merged))
    for name in ("logits", "distances", "centerness"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-4, atol=1e-4)


def test_names_of_the_head_are_mmdetections():
    tower = [
        f"{name}_convs.{i}.{part}"
        for name in ("cls", "reg")
        for i in range(4)
        for part in ("conv.weight", "gn.weight", "gn.bias")
    ]
    last = [f"conv_{name}.{part}" for name in ("cls", "reg", "centerness") for part in ("weight", "bias")]
    state = build().bbox_head.state_dict()
    assert set(state) == {*tower, *last, *(f"scales.{i}.scale" for i in range(5))}
    assert state["scales.0.scale"].shape == ()


def test_an_untrained_head_takes_one_point_in_a_hundred_for_an_object():
    head = build().bbox_head
    assert head.conv_cls.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    assert head.conv_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert [p for p in (head.conv_reg.bias, head.conv_centerness.bias) if p.any()] == []


def test_groups_divide_the_channels():
    for channels, groups in ((256, 32), (40, 20), (32, 16), (5, 1)):
        assert build(channels=channels).bbox_head.cls_convs[0].gn.num_groups == groups
    with pytest.raises(ValueError, match="expected a multiple of 32, got 40"):
        build(channels=40, kind=torchvision_fcos)


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("mobilenetv2_100", {}, (8, 16, 32, 64, 128)),
        ("replknet_cifar_l", {"stem_stride": 4}, (8, 16, 32, 64)),
        ("replknet_cifar_l", {}, (8, 16, 32)),
    ],
)
def test_the_levels_are_those_that_the_backbone_has(name, options, strides):
    model = FCOS(timm.create_model(name, features_only=True, **options), 3, 32).eval()
    assert model.pyramid.strides == strides
    assert len(model.bbox_head.scales) == len(strides)
    found = points_of([(2, 2)] * len(strides), strides)
    assert found.ranges[::4].tolist() == [
        [-1 if i == 0 else 4 * s, 1e8 if i == len(strides) - 1 else 8 * s] for i, s in enumerate(strides)
    ]
    with torch.inference_mode():
        (image,) = model([torch.randn(3, 64, 96)])
    assert image["boxes"].shape[1] == 4


def test_features_of_other_strides_are_refused():
    for options, strides in (({"stem_stride": 1}, "1, 2, 4"), ({"out_indices": (0, 2), "stem_stride": 4}, "4, 16")):
        backbone = timm.create_model("replknet_cifar_l", features_only=True, **options)
        with pytest.raises(ValueError, match=rf"features of strides 8, 16 and so on, got \[{strides}\]"):
            FCOS(backbone, 3)
    with pytest.raises(
        ValueError, match="torchvision's detector has levels of strides 8, 16, 32, 64, 128, got 8, 16, 32"
    ):
        torchvision_fcos(timm.create_model("replknet_cifar_l", features_only=True), 3, 32)
