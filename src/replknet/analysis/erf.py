"""The effective receptive field: which input pixels the centre of the last feature map depends on.

Luo et al. 2016, arXiv:1701.04128; protocol of Ding et al. 2022, arXiv:2203.06717, section 5 and the official
`erf/` scripts: gradients of the rectified centre of the last feature map *before the final norm*, rectified,
summed over images and channels; shares are of the map on a logarithmic scale.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass(frozen=True)
class ERF:
    """An effective receptive field.

    Args:
        map: `[H,W]`, float64: the mean over images of the summed rectified gradients.
        sides: for each threshold the side in pixels of the smallest centred square that holds more than this
            share of the log-scaled map, or None where even the largest does not.
        areas: that square's share of the image, from 0 to 1.
        images: how many there were.
    """

    map: Tensor
    sides: dict[float, int | None]
    areas: dict[float, float | None]
    images: int

    @property
    def log_map(self) -> Tensor:
        """log10(map + 1), scaled to a largest value of 1: what the paper shows and measures."""
        return _log_scaled(self.map)


def effective_receptive_field(
    model: nn.Module,
    images: Iterable[Tensor],
    features: Callable[[Tensor], Tensor] | None = None,
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> ERF:
    """The effective receptive field of a network.

    Args:
        model: any network; it is put into eval mode.
        images: batches of normalised images `[N,C,H,W]`, all of one size, in the dtype and on the device of the
            model. Large images show more: the official protocol resizes to 1024x1024.
        features: from images to the last feature map `[N,C,h,w]`. By default the last stage's features
            before the final norm, for models with timm's `forward_intermediates`.
        thresholds: shares, from 0 to 1.

    Returns:
        The map, and the side and the area of the square that holds each share. Larger is wider.

    Raises:
        ValueError: there is no image; images of different sizes; a model without `forward_intermediates`
            and no `features`; or gradients that are all zero or not finite.

    Source: Luo et al. 2016, arXiv:1701.04128; protocol of Ding et al. 2022, arXiv:2203.06717, section 5 and its
    `erf/` scripts.
    """
    take = features or _last_features(model)
    model.eval()
    total: Tensor | None = None
    count = 0
    for batch in images:
        x = batch.detach().clone().requires_grad_()
        y = take(x)
        centre = y[:, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, x)
        found = gradient.relu().double().sum((0, 1))
        if total is not None and total.shape != found.shape:
            raise ValueError(f"images must have one size, got {list(total.shape)} and {list(found.shape)}")
        total = found if total is None else total + found
        count += len(x)
    if total is None:
        raise ValueError("no images")
    if not torch.isfinite(total).all() or not total.any():
        raise ValueError("the gradients are zero or not finite everywhere: the network does not see its input")
    mean = total / count
    sides = {t: _side(_log_scaled(mean), t) for t in thresholds}
    return ERF(mean, sides, {t: None if s is None else s**2 / mean.numel() for t, s in sides.items()}, count)


def _last_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    method = getattr(model, "forward_intermediates", None)
    if method is None:
        raise ValueError(
            f"{type(model).__name__} has no forward_intermediates; pass features=, a function from images to "
            "the last feature map [N,C,h,w]"
        )
    return lambda x: method(x, indices=1, intermediates_only=True)[-1]


def _log_scaled(map: Tensor) -> Tensor:
    scaled = (map + 1).log10()
    return scaled / scaled.max()


def _side(map: Tensor, threshold: float) -> int | None:
    """Side 2i+1 of the smallest centred square, i from 1, that holds more than this share of the sum."""
    h, w = map.shape
    total = map.sum()
    for i in range(1, min(h, w) // 2):
        part = map[h // 2 - i : h // 2 + i + 1, w // 2 - i : w // 2 + i + 1].sum()
        if part / total > threshold:
            return 2 * i + 1
    return None
