"""Region proposals as in mmdetection's Cascade Mask R-CNN, on torchvision's RegionProposalNetwork.

Two details are torchvision's. It drops proposals with a side below 0.001 pixels; mmdetection drops a side of 0. It
divides the losses by the number of sampled anchors; mmdetection counts one more for an image without positives.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

# index that `assigned` gives a box without ground truth
BACKGROUND, IGNORED = -1, -2


def assigned(boxes: Tensor, truth: Tensor, low: float, high: float, rescue: float | None = None) -> Tensor:
    """Index of the ground truth that each box should find.

    Args:
        boxes: `[N,4]`, corners in pixels.
        truth: boxes of the ground truth `[T,4]`, corners in pixels; T may be 0.
        low: a box is background if its best IoU is below `low`.
        high: a box belongs to the ground truth with the best IoU if that IoU is at least `high`.
        rescue: a ground truth also gets the boxes that overlap it most, if their IoU is at least `rescue`. This rule
            overrides the others; if two ground truths claim a box, the last one gets it. None: no such rule.

    Returns:
        `[N]` int64: the index, BACKGROUND or IGNORED.
    """
    if not boxes.numel() or not truth.numel():
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    iou = box_iou(truth, boxes)
    best, index = iou.max(0)
    # the IoU of two boxes without an area is 0 / 0
    best = best.nan_to_num(0.0)
    index[best < high] = IGNORED
    index[best < low] = BACKGROUND
    if rescue is not None:
        highest = iou.amax(1, keepdim=True)
        owner, box = ((iou == highest) & (highest >= rescue)).nonzero().unbind(1)
        last = torch.full_like(index, BACKGROUND).scatter_reduce(0, box, owner, "amax")
        index = torch.where(last >= 0, last, index)
    return index


class BoxCoder(_utils.BoxCoder):
    """torchvision's coder of boxes as differences. It decodes in float32, and limits shrinking as it limits growth.

    Args:
        deviations: divisors of the differences of x, y, log width and log height.
    """

    def __init__(self, deviations: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        super().__init__(weights=tuple(1 / deviation for deviation in deviations))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes `[N,4*K]` from differences `[N,4*K]` to boxes `[N,4]`."""
        limit = torch.tensor([math.inf, math.inf, self.bbox_xform_clip, self.bbox_xform_clip], device=boxes.device)
        limit = (limit * limit.new_tensor(self.weights)).repeat(rel_codes.shape[1] // 4)
        return super().decode_single(torch.maximum(rel_codes.float(), -limit), boxes)


class Anchors(nn.Module):
    """Anchors: three boxes round every multiple of each level's stride, with the interface of torchvision's generator.

    torchvision's own generator rounds the corners. It takes image side / grid side as the stride, which can differ from
    the level's stride.

    Args:
        strides: strides of the levels, pixels.
        scale: side of a square anchor divided by the stride.
        ratios: height divided by width of each anchor; all anchors of a level have equal areas.
    """

    def __init__(self, strides: Sequence[int], scale: float = 8.0, ratios: tuple[float, ...] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.scale = scale
        self.ratios = ratios

    def num_anchors_per_location(self) -> list[int]:
        return [len(self.ratios)] * len(self.strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors `[N,4]` of each image, float32: level by level, row by row, the ratios innermost."""
        levels = [self._level(*pair) for pair in zip(self.strides, feature_maps, strict=True)]
        return [torch.cat(levels)] * len(image_list.image_sizes)

    def _level(self, stride: int, feature: Tensor) -> Tensor:
        height, width = feature.shape[-2:]
        y = torch.arange(height, device=feature.device, dtype=torch.float32) * stride
        x = torch.arange(width, device=feature.device, dtype=torch.float32) * stride
        centres = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), 2)
        sides = [(self.scale * stride / ratio**0.5, self.scale * stride * ratio**0.5) for ratio in self.ratios]
        half = torch.tensor(sides, device=feature.device) / 2
        centres = centres[:, :, None]
        return torch.cat((centres - half, centres + half), 3).reshape(-1, 4)


class _Head(RPNHead):
    """torchvision's head with results in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, differences = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in differences]


class RegionProposals(RegionProposalNetwork):
    """Boxes that may hold an object, and two losses that train them.

    Training takes 256 anchors an image, at most half of them positive. An anchor is positive if its IoU is at least
    0.7, or if no other anchor has a larger IoU with some ground truth and that IoU is at least 0.3. It is negative if
    its IoU is below 0.3. Anchors that cross the border of their image are not trained.

    Each level proposes its best 2000 anchors (1000 in eval mode), moved and clipped. Suppression at an IoU of 0.7
    within each level follows, then the best 2000 (1000) of all levels remain. If none remains, the whole image is the
    only proposal.

    Args:
        strides: strides of the levels, pixels.
        channels: channels of the levels.

    Source: Ren et al. 2015, "Faster R-CNN", arXiv:1506.01497, with the settings of the paper's detectors.
    """

    def __init__(self, strides: Sequence[int], channels: int) -> None:
        anchors = Anchors(strides)
        kept = {"training": 2000, "testing": 1000}
        super().__init__(
            anchors,
            _Head(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=kept,
            post_nms_top_n=kept,
            nms_thresh=0.7,
        )
        self.box_coder = BoxCoder()

    def forward(
        self, images: ImageList, features: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals `[N,4]` of each image, best first and without gradient, and in training mode the losses.

        Args:
            images: the batch, and the size of each image in it.
            features: the levels, `[N,C,h,w]`.
            targets: for each image its `boxes` `[n,4]`.
        """
        if targets is not None:
            # `assign_targets_to_anchors` sees only anchors and targets, so the targets carry the sizes
            targets = [
                {"boxes": target["boxes"].float(), "size": torch.tensor(size)}
                for target, size in zip(targets, images.image_sizes, strict=True)
            ]
        named = {str(i): level for i, level in enumerate(features)}
        boxes, losses = super().forward(images, named, targets)
        boxes = [
            found if len(found) else found.new_tensor([[0, 0, width, height]])
            for found, (height, width) in zip(boxes, images.image_sizes, strict=True)
        ]
        names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_box"}
        return boxes, {names[name]: loss for name, loss in losses.items()}

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each anchor 1 (positive), 0 (negative) or -1 (ignored), and its ground truth `[N,4]`."""
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            height, width = target["size"].tolist()
            inside = ((boxes[:, :2] >= 0).all(1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)).nonzero()[:, 0]
            truth = target["boxes"]
            index = assigned(boxes[inside], truth, 0.3, 0.7, rescue=0.3)
            label = boxes.new_full((len(boxes),), -1.0)
            label[inside] = (index >= 0).float() - (index == IGNORED).float()
            labels.append(label)
            # an anchor without ground truth gets itself, so that all differences are finite
            wanted = boxes.clone()
            positive = index >= 0
            wanted[inside[positive]] = truth[index[positive]]
            matched.append(wanted)
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both losses; 0 if no anchor of the batch lies inside its image."""
        if not any((label >= 0).any() for label in labels):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
