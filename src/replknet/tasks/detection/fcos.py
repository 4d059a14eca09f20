"""FCOS, a detector without anchors, as in mmdetection 2.x, whose weights fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss

from replknet.tasks.detection.batches import batched, objects
from replknet.tasks.detection.pyramid import Pyramid

# distance from one point of a level to the next, pixels
_STRIDES = (8, 16, 32, 64, 128)
# larger than any distance from a point to a side of a box, pixels
_FAR = 1e8
# label of a point without an object
_NOTHING = -1
# probability of each class that an untrained head gives every point
_PRIOR = 0.01

_CANDIDATES = 1000  # points of a level that may become boxes
_MIN_SCORE = 0.05  # smallest class score of a box, without centerness
_NMS_IOU = 0.5
_MOST = 100  # boxes of an image


@dataclass(frozen=True)
class Points:
    """The P points of the head, level after level.

    Args:
        xy: places of the points `[P,2]`, pixels.
        ranges: a point takes a box if the distance to the box's furthest side is in this range (from, to) `[P,2]`,
            pixels.
        counts: number of points of each level.
    """

    xy: Tensor
    ranges: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Outputs:
    """The head's outputs for every point, float32.

    Args:
        logits: logits of the classes `[N,P,classes]`.
        distances: distances to the left, top, right and bottom side of the box `[N,P,4]`, pixels, positive.
        centerness: logits of the centerness, which says how central the point is in its box `[N,P]`.
    """

    logits: Tensor
    distances: Tensor
    centerness: Tensor


class FCOS(nn.Module):
    """A backbone, a feature pyramid of strides 8 to 128, and the head of mmdetection 2.x, whose weights fit.

    Args:
        backbone: a timm model with `features_only=True`. Its features from stride 8 on are used: 8, 16 and 32 in the
            paper. With fewer features the pyramid has fewer levels.
        num_classes: number of classes.
        channels: channels of the pyramid and the head; 256 in the paper. GroupNorm has 32 groups, or the largest
            smaller number that gives each group at least two channels.
        convs: number of convolutions in each of the head's two towers.

    Input: images `[3,H,W]`, normalised, of any sizes. Training also needs one dict an image: `boxes` `[n,4]`
    (x1, y1, x2, y2, pixels), `labels` `[n]` int64 from 0, and optionally `crowd` `[n]` bool. Crowds are left out.
    Output: in training the scalars `loss_cls`, `loss_bbox` and `loss_centerness`, float32. Otherwise one dict an image:
    `boxes` `[n,4]` inside the image, `labels` `[n]`, `scores` `[n]`, best first, at most 100.

    GroupNorm and large kernels see the zeros that pad a batch. The boxes of an image therefore depend a little on the
    sizes of the other images, as in mmdetection.

    Raises:
        ValueError: the features have other strides; in training, the numbers of images and targets differ.

    Source: Tian et al. 2019, "FCOS", arXiv:1904.01355, as implemented in mmdetection 2.x: distances are exponentials,
    every point in a box may learn the box, and centerness comes from the tower of the classes.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int = 256, convs: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pyramid = Pyramid(backbone, finest=8, channels=channels, extra="convs")
        self.bbox_head = _Head(channels, num_classes, convs, len(self.pyramid.strides))

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        truth = objects(images, targets, masks=False) if self.training else []
        x, sizes = batched(images)
        levels = self.pyramid(x)
        points = points_of([(level.shape[2], level.shape[3]) for level in levels], self.pyramid.strides, x.device)
        outputs = self.bbox_head(levels)
        if self.training:
            found = [assigned(points, target["boxes"], target["labels"]) for target in truth]
            labels, distances = (torch.stack(parts) for parts in zip(*found, strict=True))
            return losses(outputs, labels, distances)
        each = zip(outputs.logits, outputs.distances, outputs.centerness, sizes, strict=True)
        return [_detected(points, logits, sides, central, size) for logits, sides, central, size in each]


class _ConvNorm(nn.Module):
    """A 3x3 convolution without bias, GroupNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # at least two channels a group: the last level of a small image is one point, and torch refuses one value
        groups = max(n for n in range(1, 33) if channels % n == 0 and (channels > n or n == 1))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)), inplace=True)


class _Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Head(nn.Module):
    """Two towers that all levels share. The names are mmdetection's, as in the official weights."""

    def __init__(self, channels: int, num_classes: int, convs: int, levels: int) -> None:
        super().__init__()
        self.cls_convs = nn.Sequential(*(_ConvNorm(channels) for _ in range(convs)))
        self.reg_convs = nn.Sequential(*(_ConvNorm(channels) for _ in range(convs)))
        self.conv_cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(_Scale() for _ in range(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.conv_cls.bias is not None
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, levels: Sequence[Tensor]) -> Outputs:
        logits, distances, centerness = [], [], []
        for level, scale in zip(levels, self.scales, strict=True):
            classes, sides = self.cls_convs(level), self.reg_convs(level)
            logits.append(_listed(self.conv_cls(classes)))
            centerness.append(_listed(self.conv_centerness(classes)))
            distances.append(scale(_listed(self.conv_reg(sides))).exp())
        return Outputs(torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(centerness, 1).squeeze(2))


def _listed(x: Tensor) -> Tensor:
    """`[N,C,H,W]` as `[N,HW,C]` in float32, row after row."""
    return x.float().flatten(2).transpose(1, 2)


def points_of(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int] = _STRIDES, device: torch.device | None = None
) -> Points:
    """The points of all levels, each in the middle of its cell, row after row.

    A point takes boxes whose furthest side is 4 to 8 strides away, limits included. Points of the first level also take
    smaller boxes, points of the last level larger ones.

    Args:
        sizes: height and width of each level, finest first.
        strides: strides of the levels, pixels; each is twice the one before.
        device: device of the points.

    Returns:
        All points, float32.
    """
    places, ranges = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        limits = -1.0 if stride == strides[0] else 4.0 * stride, _FAR if stride == strides[-1] else 8.0 * stride
        y, x = (torch.arange(n, device=device) * stride + stride // 2 for n in (height, width))
        # not cartesian_prod, which ONNX lacks
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), 2)
        places.append(grid.flatten(0, 1).float())
        ranges.append(torch.tensor(limits, device=device).expand(height * width, 2))
    return Points(torch.cat(places), torch.cat(ranges), [height * width for height, width in sizes])


def assigned(points: Points, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The object that each point should find: the smallest box around the point that fits its level.

    Args:
        points: P points.
        boxes: x1, y1, x2, y2 of the objects in an image `[n,4]`, float32, pixels.
        labels: classes of the objects `[n]`, int64 from 0.

    Returns:
        The class of each point `[P]`, -1 for none, and the distances to the left, top, right and bottom side of its box
        `[P,4]`, pixels. Without an object the distances have no meaning.
    """
    if len(boxes) == 0:
        return labels.new_full((len(points.xy),), _NOTHING), torch.zeros_like(points.xy).repeat(1, 2)
    xy = points.xy[:, None]
    distances = torch.cat([xy - boxes[:, :2], boxes[:, 2:] - xy], 2)  # [P,n,4]
    furthest = distances.amax(2)
    fits = (furthest >= points.ranges[:, :1]) & (furthest <= points.ranges[:, 1:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).expand_as(fits)
    smallest, index = areas.masked_fill(~fits | (distances.amin(2) <= 0), math.inf).min(1)
    chosen = distances.gather(1, index[:, None, None].expand(-1, 1, 4)).squeeze(1)
    return labels[index].masked_fill(smallest.isinf(), _NOTHING), chosen


def centerness_of(distances: Tensor) -> Tensor:
    """How central a point is in its box, 1 in the middle and 0 on a side: `[...,4]` positive distances to `[...]`."""
    pairs = distances.unflatten(-1, (2, 2))  # left and top, right and bottom
    return (pairs.amin(-2) / pairs.amax(-2)).prod(-1).sqrt()


def losses(outputs: Outputs, labels: Tensor, distances: Tensor) -> dict[str, Tensor]:
    """The three losses of a batch.

    Args:
        outputs: outputs of the head for N images with P points.
        labels: the class of each point `[N,P]`, int64, -1 for none.
        distances: distances of each point to the sides of its box `[N,P,4]`, pixels.

    Returns:
        Scalars, float32. `loss_cls` is the focal loss (alpha 0.25, gamma 2), summed over points and classes.
        `loss_bbox` is -log IoU, averaged with the centerness as weight. `loss_centerness` is the binary cross entropy,
        summed over points with an object. The two sums are divided by the number of points with an object: its mean
        over all processes, at least 1.

    Source: mmdetection 2.x, FCOSHead.
    """
    positive = labels != _NOTHING
    classes = outputs.logits.shape[2]
    wanted = F.one_hot(labels + 1, classes + 1)[..., 1:].to(outputs.logits.dtype)
    aim, said = distances[positive], outputs.distances[positive]
    centerness = centerness_of(aim)
    sums = _process_mean(torch.stack([positive.sum().to(centerness.dtype), centerness.sum()]))
    points, weight = sums[0].clamp(min=1), sums[1].clamp(min=1e-6)
    far = -_iou(said, aim).clamp(min=1e-6).log()
    central = F.binary_cross_entropy_with_logits(outputs.centerness[positive], centerness, reduction="sum")
    return {
        "loss_cls": sigmoid_focal_loss(outputs.logits, wanted, alpha=0.25, gamma=2, reduction="sum") / points,
        "loss_bbox": (far * centerness).sum() / weight,
        "loss_centerness": central / points,
    }


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of pairs of boxes round one point each, from the distances to their sides `[n,4]`."""
    common = torch.minimum(a, b)
    both, first, second = (((d[:, :2] + d[:, 2:]).prod(1)) for d in (common, a, b))
    return both / (first + second - both).clamp(min=1e-6)


def _process_mean(x: Tensor) -> Tensor:
    """The mean over all processes of a distributed training."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    x = x / dist.get_world_size()
    dist.all_reduce(x)
    return x


def _detected(
    points: Points, logits: Tensor, distances: Tensor, centerness: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """The boxes of one image of (height, width)."""
    scores, central = logits.sigmoid(), centerness.sigmoid()[:, None]
    kept, start = [], 0
    for level in (scores * central).amax(1).split(points.counts):
        kept.append(start + level.topk(min(_CANDIDATES, len(level))).indices)
        start += len(level)
    best = torch.cat(kept)
    xy, sides, scores, central = points.xy[best], distances[best], scores[best], central[best]
    boxes = clip_boxes_to_image(torch.cat([xy - sides[:, :2], xy + sides[:, 2:]], 1), size)
    # the class score decides which boxes take part in the suppression; class score times centerness ranks them
    index, label = (scores > _MIN_SCORE).nonzero(as_tuple=True)
    boxes, ranking = boxes[index], (scores * central)[index, label]
    best = batched_nms(boxes, ranking, label, _NMS_IOU)[:_MOST]
    return {"boxes": boxes[best], "labels": label[best], "scores": ranking[best]}
