"""Region proposals as mmdetection's Cascade Mask R-CNN makes them, on torchvision's RegionProposalNetwork.

Kept of torchvision, where mmdetection differs: proposals with a side below 0.001 pixels are dropped (there: with a side
of 0), and the losses are divided by the number of sampled anchors (there an image without positives counts one more).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

# what `assigned` gives boxes that have no ground truth
BACKGROUND, IGNORED = -1, -2


def assigned(boxes: Tensor, truth: Tensor, low: float, high: float, rescue: float | None = None) -> Tensor:
    """Index of the ground truth that each box is to find.

    Args:
        boxes: `[N,4]`, corners in pixels.
        truth: ground truth `[T,4]`, alike; T may be 0.
        low: boxes whose best IoU is below are background.
        high: boxes whose best IoU is this or more belong to the ground truth that has it.
        rescue: a ground truth whose best IoU with any box is this or more gets the boxes that have it, too, whatever
            they had before; of several such the last. None for no such rule.

    Returns:
        `[N]` int64: the index, BACKGROUND or IGNORED.
    """
    if not boxes.numel() or not truth.numel():
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    iou = box_iou(truth, boxes)
    best, index = iou.max(0)
    # two boxes without an area have 0 / 0
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
    """torchvision's coder of boxes as differences, decoding in float32 and with shrinking limited like growth.

    Args:
        deviations: by which the differences of x, y, log width and log height are divided.
    """

    def __init__(self, deviations: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        super().__init__(weights=tuple(1 / deviation for deviation in deviations))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes `[N,4*K]` of differences `[N,4*K]` to boxes `[N,4]`."""
        limit = torch.tensor([math.inf, math.inf, self.bbox_xform_clip, self.bbox_xform_clip], device=boxes.device)
        limit = (limit * limit.new_tensor(self.weights)).repeat(rel_codes.shape[1] // 4)
        return super().decode_single(torch.maximum(rel_codes.float(), -limit), boxes)


class Anchors(nn.Module):
    """Three boxes round every multiple of each level's stride, with torchvision's interface of anchor generators.

    torchvision rounds their corners and divides the image by the grid, which is not the stride where a grid is odd.

    Args:
        strides: of the levels, pixels.
        scale: of an anchor's side to the stride.
        ratios: height to width; the area is that of the square.
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
    """torchvision's head, its results in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, differences = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in differences]


class RegionProposals(RegionProposalNetwork):
    """Boxes that may hold an object, and the two losses of finding them.

    Trained on 256 anchors an image, half of them positive at most: IoU of 0.7 and more, or the best of a ground truth
    if that is 0.3 and more, against IoU below 0.3. Anchors that reach over the border of their image are not trained
    on. Proposals are the best 2000 of each level (1000 in eval mode), clipped, and of these, after suppression at IoU
    0.7 within the level, the best 2000 (1000) of all. An image that has none left gets one as large as itself.

    Args:
        strides: of the levels, pixels.
        channels: of the levels.

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
        """Proposals `[N,4]` of each image, best first, without gradient; in training mode with the losses.

        Args:
            images: the batch with the size of each image in it.
            features: the levels, `[N,C,h,w]`.
            targets: of each image its `boxes` `[n,4]`.
        """
        if targets is not None:
            # the sizes reach `assign_targets_to_anchors` so
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
        """Of each anchor 1 (positive), 0 (negative) or -1 (ignored), and its ground truth `[N,4]`."""
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            height, width = target["size"].tolist()
            inside = ((boxes[:, :2] >= 0).all(1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)).nonzero()[:, 0]
            truth = target["boxes"]
            index = assigned(boxes[inside], truth, 0.3, 0.7, rescue=0.3)
            label = boxes.new_full((len(boxes),), -1.0)
            label[inside] = (index >= 0).float() - (index == IGNORED).float()
            labels.append(label)
            # an anchor without ground truth gets itself, which has a finite difference
            wanted = boxes.clone()
            positive = index >= 0
            wanted[inside[positive]] = truth[index[positive]]
            matched.append(wanted)
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both losses; 0 where no anchor of the batch lies inside its image."""
        if not any((label >= 0).any() for label in labels):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
