"""Cascade R-CNN and Cascade Mask R-CNN, as in mmdetection 2.x, whose weights fit.

Two details are torchvision's, not mmdetection's: masks are pasted into boxes of whole pixels, and torchvision's own
constants keep the GIoU loss from dividing by 0.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from replknet.nn.conv_bn import ConvBN
from replknet.tasks.detection.batches import batched, objects
from replknet.tasks.detection.pyramid import Pyramid
from replknet.tasks.detection.rpn import BoxCoder, RegionProposals, assigned

_BOX_SIDE, _MASK_SIDE = 7, 14  # samples of a feature level across a region
_BOX_WEIGHT = 10.0  # weight of the GIoU loss
_SAMPLES = 512  # regions of an image in training
_POSITIVE = 0.25  # largest share of them with an object
_MIN_SCORE = 0.05
_NMS_IOU = 0.5
_MOST = 100  # boxes of an image


@dataclass(frozen=True)
class Stage:
    """One stage of the cascade.

    Args:
        iou: a region gets the class of the object with the best IoU if that IoU is at least `iou`, else background.
        deviations: units of a box's differences: x and y divided by the region's sides, logarithms of width and height.
        weight: weight of the stage's losses.
    """

    iou: float
    deviations: tuple[float, float, float, float]
    weight: float

    @property
    def coder(self) -> BoxCoder:
        return BoxCoder(self.deviations)


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


@dataclass(frozen=True)
class Regions:
    """The regions of one image that a stage is trained on.

    Args:
        boxes: `[n,4]`, pixels.
        labels: `[n]`: the class of each region; background is the number of classes.
        index: `[n]`: the object of the image that each region should find, or -1.
        is_truth: `[n]` bool: whether the region is the box of an object itself.
    """

    boxes: Tensor
    labels: Tensor
    index: Tensor
    is_truth: Tensor


class CascadeRCNN(nn.Module):
    """A backbone, a feature pyramid, region proposals, and stages. Each stage refines the boxes of the stage before.

    Args:
        backbone: a timm model with `features_only=True`. Its features from stride 4 on are used: 4, 8, 16 and 32 in the
            paper. With fewer features the pyramid has fewer levels.
        num_classes: number of classes.
        masks: whether each stage has a mask head, too (Cascade Mask R-CNN).
        channels: channels of the pyramid and of the heads' convolutions; 256 in the paper.
        fc_channels: channels of the box heads' hidden layer; 1024 in the paper.
        stages: the stages of the cascade.

    Input: images `[3,H,W]`, normalised, of any sizes. Training also needs one dict an image: `boxes` `[n,4]`
    (x1, y1, x2, y2, pixels), `labels` `[n]` int64 from 0, `masks` `[n,H,W]` uint8 if the network has masks, and
    optionally `crowd` `[n]` bool. Crowds are left out.
    Output: in training the weighted scalars `loss_rpn_cls`, `loss_rpn_box`, and for each stage `s0.loss_cls`,
    `s0.loss_bbox`, `s0.loss_mask`, float32. Otherwise one dict an image: `boxes` `[n,4]` inside the image, `labels`
    `[n]`, `scores` `[n]`, best first, at most 100, and `masks` `[n,H,W]`, probabilities.

    Raises:
        ValueError: the features lack stride 4; in training, the numbers of images and targets differ, or masks are
            missing.

    Source: Cai and Vasconcelos 2019, "Cascade R-CNN", arXiv:1906.09756, as implemented in mmdetection 2.x: class scores
    of all stages are averaged before the softmax, masks after the sigmoid.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        masks: bool = True,
        channels: int = 256,
        fc_channels: int = 1024,
        stages: tuple[Stage, ...] = STAGES,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stages = stages
        self.pyramid = Pyramid(backbone, channels=channels)
        self.rpn = RegionProposals(self.pyramid.strides, channels)
        self.bbox_head = nn.ModuleList(_BoxHead(num_classes, channels, fc_channels) for _ in stages)
        self.mask_head = nn.ModuleList(_MaskHead(num_classes, channels) for _ in stages) if masks else None
        self.sampler = BalancedPositiveNegativeSampler(_SAMPLES, _POSITIVE)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        truth = objects(images, targets, self.mask_head is not None) if self.training else None
        x, sizes = batched(images)
        levels = self.pyramid(x)
        proposals, losses = self.rpn(ImageList(x, sizes), levels, truth)
        if truth is None:
            return self._detected(levels, proposals, sizes)
        for i, stage in enumerate(self.stages):
            regions = [self._sampled(*pair, stage.iou) for pair in zip(proposals, truth, strict=True)]
            logits, differences = self._box_outputs(i, levels, [image.boxes for image in regions])
            found = {"loss_cls": F.cross_entropy(logits, torch.cat([image.labels for image in regions]))}
            found["loss_bbox"] = box_loss(regions, differences, truth, stage.coder)
            if self.mask_head is not None:
                found["loss_mask"] = self._mask_loss(i, levels, regions, truth)
            losses |= {f"s{i}.{name}": loss * stage.weight for name, loss in found.items()}
            if i + 1 < len(self.stages):
                proposals = next_proposals(regions, logits.detach(), differences.detach(), stage.coder, sizes)
        return losses

    def _sampled(self, proposals: Tensor, truth: dict[str, Tensor], iou: float) -> Regions:
        boxes = truth["boxes"]
        own = torch.arange(len(boxes), device=boxes.device)
        index = torch.cat((own, assigned(proposals, boxes, iou, iou)))
        (positive,), (negative,) = self.sampler([(index >= 0).long()])
        chosen = (positive | negative).nonzero()[:, 0]
        index = index[chosen]
        labels = torch.full_like(index, self.num_classes)
        labels[index >= 0] = truth["labels"][index[index >= 0]]
        return Regions(torch.cat((boxes, proposals))[chosen], labels, index, chosen < len(boxes))

    def _box_outputs(self, stage: int, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits `[n,classes+1]` and box differences `[n,4*classes]` of all images' regions, float32."""
        logits, differences = self.bbox_head[stage](pooled(levels[:-1], boxes, _BOX_SIDE, self.pyramid.strides[:-1]))
        return logits.float(), differences.float()

    def _mask_logits(self, stage: int, levels: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Mask logits `[n,28,28]` of each region's class, float32."""
        assert self.mask_head is not None
        logits = self.mask_head[stage](pooled(levels[:-1], boxes, _MASK_SIDE, self.pyramid.strides[:-1]))
        return logits[torch.arange(labels.shape[0], device=labels.device), labels].float()

    def _mask_loss(
        self, stage: int, levels: Sequence[Tensor], regions: Sequence[Regions], truth: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        positive = [image.index >= 0 for image in regions]
        boxes = [image.boxes[chosen] for image, chosen in zip(regions, positive, strict=True)]
        labels = torch.cat([image.labels[chosen] for image, chosen in zip(regions, positive, strict=True)])
        logits = self._mask_logits(stage, levels, boxes, labels)
        targets = [
            mask_targets(target["masks"], inside, image.index[chosen], logits.shape[-1])
            for target, inside, image, chosen in zip(truth, boxes, regions, positive, strict=True)
        ]
        # without masks the sum is 0, and still depends on the head, so that DDP gets its gradients
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(targets), reduction="sum")
        return loss / max(1, logits.numel())

    def _detected(
        self, levels: Sequence[Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        # not len(), which is a constant in a traced graph
        counts = [image.shape[0] for image in boxes]
        scores: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            logits, differences = self._box_outputs(i, levels, boxes)
            scores.append(logits)
            if i + 1 < len(self.stages):
                boxes = refined(boxes, logits[:, :-1].argmax(1), differences, stage.coder, sizes)
        probabilities = torch.stack(scores).mean(0).softmax(1)[:, :-1]
        every = self.stages[-1].coder.decode_single(differences, torch.cat(boxes)).unflatten(1, (-1, 4))
        each = zip(every.split(counts), probabilities.split(counts), sizes, strict=True)
        found = [best(clip_boxes_to_image(image, size), score) for image, score, size in each]
        if self.mask_head is None:
            return found
        boxes, labels = [image["boxes"] for image in found], torch.cat([image["labels"] for image in found])
        stages = [self._mask_logits(i, levels, boxes, labels).sigmoid() for i in range(len(self.stages))]
        masks = torch.stack(stages).mean(0).split([image.shape[0] for image in boxes])
        return [
            image | {"masks": paste_masks_in_image(mask[:, None], image["boxes"], size)[:, 0]}
            for image, mask, size in zip(found, masks, sizes, strict=True)
        ]


class _BoxHead(nn.Module):
    """Convolutions and one hidden layer. The outputs are class logits, background last, and a box for each class."""

    def __init__(self, num_classes: int, channels: int, fc_channels: int) -> None:
        super().__init__()
        self.shared_convs = nn.Sequential(
            *(ConvBN(channels, channels, 3, activation=nn.ReLU(inplace=True)) for _ in range(4))
        )
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * _BOX_SIDE**2, fc_channels)])
        self.fc_cls = nn.Linear(fc_channels, num_classes + 1)
        self.fc_reg = nn.Linear(fc_channels, 4 * num_classes)
        _initialize(self)
        nn.init.xavier_uniform_(self.shared_fcs[0].weight)  # type: ignore[arg-type]  # a tensor
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared_convs(x).flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class _MaskHead(nn.Module):
    """Convolutions, an upsampling that doubles the sides, and a mask for each class."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        conv = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)]
        self.convs = nn.Sequential(
            *(nn.Sequential(OrderedDict(conv=layer, nonlinear=nn.ReLU(inplace=True))) for layer in conv)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_logits(F.relu(self.upsample(self.convs(x))))


def _initialize(head: nn.Module) -> None:
    """Initialise convolutions with Kaiming normal (fan out), and biases with 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def level_of(boxes: Tensor, levels: int = 4) -> Tensor:
    """The feature level of each region, `[n]` int64: level 0 up to a side of 112 pixels, then one more per doubling.

    Args:
        boxes: `[n,4]`, pixels.
        levels: number of levels.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (area.sqrt() / 56 + 1e-6).log2().floor().clamp(0, levels - 1).long()


def pooled(levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int, strides: Sequence[int]) -> Tensor:
    """The features of each region, from the level that fits its size.

    Args:
        levels: `[N,C,h,w]` each, finest first, without the last level, which only proposals use.
        boxes: for each image `[n,4]`, pixels.
        side: samples across a region.
        strides: strides of the levels, pixels.

    Returns:
        `[sum of n,C,side,side]`, dtype of the levels, computed in float32. RoIAlign averages about one point for each
        pixel of the level under a sample; places are exact (`aligned=True`).
    """
    image = torch.cat([torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)])
    regions = torch.cat((image, torch.cat(list(boxes))), 1).float()
    level = level_of(regions[:, 1:], len(levels))
    parts = [
        roi_align(features.float(), regions[level == i], side, 1 / stride, sampling_ratio=0, aligned=True)
        for i, (features, stride) in enumerate(zip(levels, strides, strict=True))
    ]
    order = torch.cat([(level == i).nonzero()[:, 0] for i in range(len(levels))])
    return torch.cat(parts)[order.argsort()].to(levels[0].dtype)


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """The masks that a mask head should predict for regions: `[n,side,side]`, 0 or 1.

    Args:
        masks: masks of the objects `[T,H,W]`, 0 or 1.
        boxes: regions `[n,4]`, pixels.
        index: the object of each region `[n]`.
        side: samples across a region.
    """
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    regions = torch.cat((index[:, None], boxes), 1)
    share = roi_align(masks[:, None].to(regions), regions, side, sampling_ratio=0, aligned=True)
    return (share[:, 0] >= 0.5).to(boxes.dtype)


def _of_class(differences: Tensor, classes: Tensor) -> Tensor:
    """From the differences `[n,4*classes]`, those of one class for each box: `[n,4]`."""
    rows = torch.arange(classes.shape[0], device=classes.device)
    return differences.unflatten(1, (-1, 4))[rows, classes]


def box_loss(
    regions: Sequence[Regions], differences: Tensor, truth: Sequence[dict[str, Tensor]], coder: BoxCoder
) -> Tensor:
    """Ten times the sum of the GIoU losses of regions with an object, divided by the number of all regions.

    Args:
        regions: regions of each image.
        differences: differences of all regions `[n,4*classes]`, float32.
        truth: for each image its `boxes` `[T,4]`.
        coder: coder of the stage.
    """
    positive = torch.cat([image.index >= 0 for image in regions])
    pairs = zip(truth, regions, strict=True)
    wanted = torch.cat([target["boxes"][image.index[image.index >= 0]] for target, image in pairs])
    start = torch.cat([image.boxes for image in regions])[positive]
    labels = torch.cat([image.labels for image in regions])[positive]
    decoded = coder.decode_single(_of_class(differences[positive], labels), start)
    return _BOX_WEIGHT * generalized_box_iou_loss(decoded, wanted, reduction="sum") / max(1, len(positive))


def refined(
    boxes: Sequence[Tensor], classes: Tensor, differences: Tensor, coder: BoxCoder, sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Boxes moved by the differences of one class each, and clipped to their image.

    Args:
        boxes: for each image `[n,4]`, pixels.
        classes: class of each box `[sum of n]`.
        differences: `[sum of n,4*classes]`.
        coder: coder of the stage.
        sizes: height and width of each image.
    """
    moved = coder.decode_single(_of_class(differences, classes), torch.cat(list(boxes)))
    each = zip(moved.split([own.shape[0] for own in boxes]), sizes, strict=True)
    return [clip_boxes_to_image(own, size) for own, size in each]


def next_proposals(
    regions: Sequence[Regions],
    logits: Tensor,
    differences: Tensor,
    coder: BoxCoder,
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """The proposals for the next stage: regions moved by the differences of their label.

    A background region moves by its likeliest class. The boxes of the objects themselves are left out, since each stage
    adds them again.
    """
    labels = torch.cat([image.labels for image in regions])
    background = labels == logits.shape[1] - 1
    classes = torch.where(background, logits[:, :-1].argmax(1), labels)
    moved = refined([image.boxes for image in regions], classes, differences, coder, sizes)
    return [own[~image.is_truth] for own, image in zip(moved, regions, strict=True)]


def best(boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """The boxes of one image to report, best first: above the smallest score, after suppression within each class.

    Args:
        boxes: `[n,classes,4]`.
        scores: probabilities `[n,classes]`.
    """
    region, label = (scores > _MIN_SCORE).nonzero().unbind(1)
    chosen, score = boxes[region, label], scores[region, label]
    keep = batched_nms(chosen, score, label, _NMS_IOU)[:_MOST]
    return {"boxes": chosen[keep], "labels": label[keep], "scores": score[keep]}
