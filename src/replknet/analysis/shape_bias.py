"""Shape bias: which of two conflicting cues a classifier follows, the shape in an image or the texture.

Geirhos et al. 2019, "ImageNet-trained CNNs are biased towards texture", arXiv:1811.12231. The mapping from ImageNet to
16 categories and the decision rule come from the authors' repositories, rgeirhos/texture-vs-shape and
bethgelab/model-vs-human, which agree.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# category -> its outputs of an ImageNet-1k classifier, in the order of ILSVRC-2012; 207 of the 1000 have a category
CATEGORIES: dict[str, tuple[int, ...]] = {
    "airplane": (404,),
    "bear": (*range(294, 298),),
    "bicycle": (444, 671),
    # the authors left out some birds, such as ostrich and kite
    "bird": (
        *(8, *range(10, 17), 18, 19, 20, 22, 23, 24, *range(80, 84), *range(87, 97), 98, 99, 100),
        *(*range(127, 134), *range(135, 146)),
    ),
    "boat": (472, 554, 625, 814, 914),
    "bottle": (440, 720, 737, 898, 899, 901, 907),
    "car": (436, 511, 817),
    "cat": (*range(281, 287),),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    # the authors left out some dogs, such as boxer and Samoyed
    "dog": (
        *(*range(152, 192), *range(193, 204), *range(205, 227), *range(228, 242), *range(243, 251)),
        *(*range(252, 258), 259, 261, 262, 263, *range(265, 269)),
    ),
    "elephant": (385, 386),
    "keyboard": (508, 878),
    "knife": (499,),
    "oven": (766,),
    "truck": (555, 569, 656, 675, 717, 734, 864, 867),
}


@dataclass(frozen=True)
class ShapeBias:
    """Decisions on images with conflicting cues, counted by the category of the shape.

    Args:
        categories: names of the categories.
        shape: for each category, the number of images with this shape that were classified by their shape.
        texture: the number of images with this shape that were classified by their texture.
        other: the number of images with this shape that were classified as neither.
        no_conflict: the number of images whose shape and texture agree; they count nowhere else.
    """

    categories: tuple[str, ...]
    shape: tuple[int, ...]
    texture: tuple[int, ...]
    other: tuple[int, ...]
    no_conflict: int

    @property
    def images(self) -> int:
        """Images with a conflict."""
        return sum(self.shape) + sum(self.texture) + sum(self.other)

    @property
    def bias(self) -> float | None:
        """Shape decisions divided by shape and texture decisions, over all images; None if there are none."""
        return _share(sum(self.shape), sum(self.texture))

    @property
    def per_category(self) -> tuple[float | None, ...]:
        """`bias` for the images with the shape of each category."""
        return tuple(_share(s, t) for s, t in zip(self.shape, self.texture, strict=True))

    @property
    def shape_share(self) -> float | None:
        """Share of all images that were classified by their shape; None if there are no images."""
        return _share(sum(self.shape), self.images - sum(self.shape))

    @property
    def texture_share(self) -> float | None:
        """Share of all images that were classified by their texture; None if there are no images."""
        return _share(sum(self.texture), self.images - sum(self.texture))


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None


def decided(logits: Tensor) -> Tensor:
    """The category, one of 16, that an ImageNet classifier decides for.

    Args:
        logits: `[N,1000]`, outputs in the order of ILSVRC-2012.

    Returns:
        `[N]`, int64: index into `CATEGORIES` of the largest mean probability. The probabilities come from a softmax
        over all 1000 classes. The mean is arithmetic, over a category's own classes: 109 breeds of dogs count no more
        than one airliner. It is computed as a logarithm in float64. This keeps the order, and small probabilities do
        not become zero as in float32.

    Raises:
        ValueError: there are not 1000 logits, or some are not finite.

    Source: rgeirhos/texture-vs-shape, `code/probabilities_to_decision.py`. Its README recommends this mean. It says
        that the figures in the paper come from a slightly different aggregation.
    """
    if logits.ndim != 2 or logits.shape[1] != 1000:
        raise ValueError(f"expected the logits of 1000 ImageNet classes, [N, 1000], got {list(logits.shape)}")
    _check_finite(logits)
    wide = logits.double()
    means = [wide[:, list(classes)].logsumexp(1) - math.log(len(classes)) for classes in CATEGORIES.values()]
    return torch.stack(means, 1).argmax(1)


def likeliest(logits: Tensor) -> Tensor:
    """The decision of a classifier whose classes are the categories.

    Args:
        logits: `[N,classes]`.

    Returns:
        `[N]`, int64: the index of the largest logit.

    Raises:
        ValueError: some logits are not finite.
    """
    _check_finite(logits)
    return logits.argmax(1)


def _check_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise ValueError("the network's logits are not finite: its weights or the image's values are broken")


@torch.inference_mode()
def decisions(model: nn.Module, batches: Iterable[Tensor], decide: Callable[[Tensor], Tensor] = decided) -> Tensor:
    """The decisions of a network for images.

    Args:
        model: maps images to logits; it is put into eval mode.
        batches: normalised images `[N,3,H,W]`, in the dtype and on the device of the model.
        decide: maps logits `[N,classes]` to categories `[N]`: `decided`, or `likeliest` if the network's classes are
            the categories themselves.

    Returns:
        `[images]`, int64, on the CPU.

    Raises:
        ValueError: there is no image, or `decide` refuses the logits.
    """
    model.eval()
    found = [decide(model(batch)).cpu() for batch in batches]
    if not found:
        raise ValueError("no images")
    return torch.cat(found)


def shape_bias(decisions: Tensor, shapes: Tensor, textures: Tensor, categories: Sequence[str]) -> ShapeBias:
    """Count the decisions for the shape, for the texture and for neither.

    Args:
        decisions: decided category, `[N]`, int64 indices into `categories`.
        shapes: category of the shape, `[N]`.
        textures: category of the texture, `[N]`. An image with one category for both has no conflict and is left out.
        categories: names of the categories.

    Returns:
        The counts; `bias` is their ratio shape / (shape + texture).

    Raises:
        ValueError: lengths differ, or an index has no category.

    Source: Geirhos et al. 2019, arXiv:1811.12231, and the README of rgeirhos/texture-vs-shape, "How do I compute the
        shape bias of a model?".
    """
    sizes = [list(t.shape) for t in (decisions, shapes, textures)]
    if any(size != sizes[0] or len(size) != 1 for size in sizes):
        raise ValueError(f"expected one decision, shape and texture an image, got {sizes[0]}, {sizes[1]}, {sizes[2]}")
    for name, t in (("decision", decisions), ("shape", shapes), ("texture", textures)):
        if len(t) and (int(t.min()) < 0 or int(t.max()) >= len(categories)):
            raise ValueError(f"a {name} must be from 0 to {len(categories) - 1}, got {int(t.min())} to {int(t.max())}")
    conflict = shapes != textures
    for_shape, for_texture = conflict & (decisions == shapes), conflict & (decisions == textures)
    counts = [
        shapes[which].bincount(minlength=len(categories)).tolist()
        for which in (for_shape, for_texture, conflict & ~for_shape & ~for_texture)
    ]
    shape, texture, other = (tuple(found) for found in counts)
    return ShapeBias(tuple(categories), shape, texture, other, int((~conflict).sum()))
