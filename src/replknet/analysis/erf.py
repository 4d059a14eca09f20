"""The effective receptive field: which input pixels the centre of the last feature map depends on.

Luo et al. 2016, arXiv:1701.04128. The protocol comes from Ding et al. 2022, arXiv:2203.06717, section 5, and the
official `erf/` scripts:

- take the last feature map *before the final norm*, and rectify its centre;
- rectify the gradients of this centre, and sum them over images and channels;
- measure shares of the resulting map on a logarithmic scale.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)

Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class ERF:
    """An effective receptive field.

    Args:
        map: `[H,W]`, float64, on the CPU: the mean over images of the summed rectified gradients.
        sides: threshold -> side in pixels of the smallest centred square that holds more than this share of the
            scaled map. None: no square holds more.
        areas: threshold -> area of this square as a share of the image, from 0 to 1. None: no square holds more.
        images: number of images measured.
        skipped: number of images left out because their gradients were not finite.
        scale: scale of the map in `sides`, `areas` and `curve`.
    """

    map: Tensor
    sides: dict[float, int | None]
    areas: dict[float, float | None]
    images: int
    skipped: int = 0
    scale: Scale = "log"

    @property
    def log_map(self) -> Tensor:
        """log10(map + 1), scaled to a largest value of 1: the paper shows and measures this map."""
        return _scaled(self.map, "log")

    @property
    def scaled(self) -> Tensor:
        """The map on its scale, scaled to a largest value of 1: `sides`, `areas` and `curve` measure this map."""
        return _scaled(self.map, self.scale)

    def curve(self, points: int = 100) -> list[tuple[float, float]]:
        """The share of the map that centred squares of growing size hold.

        Args:
            points: at most this many squares, 2 or more; their sides are evenly spaced.

        Returns:
            For each square the pair (area as a share of the image, share of the scaled map), both from 0 to 1. The 3x3
            square is first, the whole image last. Squares are cut at the border.

        Raises:
            ValueError: fewer than two points.
        """
        if points < 2:
            raise ValueError(f"points must be 2 or more, got {points}")
        areas, shares = _squares(self.scaled)
        first, last = min(1, len(areas) - 1), len(areas) - 1
        chosen = torch.linspace(first, last, min(points, last - first + 1)).round().long()
        return list(zip(areas[chosen].tolist(), shares[chosen].tolist(), strict=True))


def effective_receptive_field(
    model: nn.Module,
    images: Iterable[Tensor],
    features: Callable[[Tensor], Tensor] | str | None = None,
    thresholds: tuple[float, ...] = THRESHOLDS,
    scale: Scale = "log",
) -> ERF:
    """The effective receptive field of a network.

    Args:
        model: any network. During the call it is in eval mode, and its parameters collect no gradients.
        images: batches of normalised images `[N,C,H,W]`, all of one size, in the dtype and on the device of the
            model. Large images show more: the official protocol resizes to 1024x1024.
        features: a function from images to the last feature map, or the dotted name of a submodule. The network then
            runs until the submodule is called once, and the output is the map. Default: the last stage's features
            before the final norm, for models with timm's `forward_intermediates`. A map is `[N,C,h,w]`, or `[N,h,w,C]`
            if the model says so, as timm's models do. Tokens `[N,L,C]` are a map, too: the first
            `model.num_prefix_tokens` are dropped if the model has this number. The rest is laid out on the grid of
            `model.patch_embed` if it fits, otherwise in the proportions of the image.
        thresholds: shares, from 0 to 1.
        scale: "log", as in the paper, or "linear"; `map` does not depend on it.

    Returns:
        The map, and the side and the area of the square that holds each share. A larger square means a wider field.
        Images whose gradients are not finite are left out and counted.

    Raises:
        ValueError: there is no image, or images differ in size. The model has no `forward_intermediates` and there are
            no `features`, or `features` names no submodule that runs. The features are no map, or have no gradient.
            All gradients are zero or not finite. The scale is unknown.

    Source: Luo et al. 2016, arXiv:1701.04128; protocol of Ding et al. 2022, arXiv:2203.06717, section 5 and its
    `erf/` scripts.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    take = _features(model, features)
    total: Tensor | None = None
    count = skipped = 0
    with _frozen(model), torch.enable_grad():
        for batch in images:
            found = _rectified_gradients(take, batch)
            if total is not None and total.shape != found.shape[1:]:
                raise ValueError(f"images must have one size, got {list(total.shape)} and {list(found.shape[1:])}")
            finite = found.isfinite().flatten(1).all(1)
            count += int(finite.sum())
            skipped += int((~finite).sum())
            found = found[finite].sum(0)
            total = found if total is None else total + found
    if total is None:
        raise ValueError("no images")
    if not total.any():
        raise ValueError(
            f"the gradients of all images are zero ({count}) or not finite ({skipped}): the network does not see its "
            "input"
        )
    mean = total / count
    sides = {t: _side(_scaled(mean, scale), t) for t in thresholds}
    areas = {t: None if s is None else s**2 / mean.numel() for t, s in sides.items()}
    return ERF(mean, sides, areas, count, skipped, scale)


def _rectified_gradients(take: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The rectified gradients of the maps' centres, summed over the images' channels: `[N,H,W]`, float64."""
    x = batch.detach().clone().requires_grad_()
    y = take(x)
    centre = y[:, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum()
    if not centre.requires_grad:
        raise ValueError("the feature map has no gradient: features must not detach it or switch gradients off")
    (gradient,) = torch.autograd.grad(centre, x)
    return gradient.relu().cpu().double().sum(1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and parameters without gradients, so that autograd keeps less memory; both are restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in trained:
            p.requires_grad_(True)


def _features(model: nn.Module, features: Callable[[Tensor], Tensor] | str | None) -> Callable[[Tensor], Tensor]:
    """A function from images to the map `[N,C,h,w]`."""
    take: Callable[[Tensor], Any]
    if features is None:
        take = _last_stage(model)
    elif isinstance(features, str):
        take = _output_of(model, features)
    else:
        take = features
    return lambda x: _as_map(take(x), x, model)


def _last_stage(model: nn.Module) -> Callable[[Tensor], Any]:
    method = getattr(model, "forward_intermediates", None)
    if method is None:
        raise ValueError(
            f"{type(model).__name__} has no forward_intermediates; pass features=, a function from images to "
            "the last feature map [N,C,h,w] or the name of the submodule that gives it"
        )
    return lambda x: method(x, indices=1, intermediates_only=True)[-1]


class _Reached(Exception):
    """Stops the network once the submodule has its output; later layers may not accept this image size."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _output_of(model: nn.Module, name: str) -> Callable[[Tensor], Any]:
    modules = dict(model.named_modules())
    if name not in modules:
        nearest = difflib.get_close_matches(name, modules, 3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else f"there are {', '.join(list(modules)[1:9])}, ..."
        raise ValueError(f"{type(model).__name__} has no submodule {name!r}; {hint}")

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> NoReturn:
        raise _Reached(output)

    def take(x: Tensor) -> Any:
        handle = modules[name].register_forward_hook(stop)
        try:
            model(x)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise ValueError(f"{name} is not called when {type(model).__name__} runs; name a submodule that is")

    return take


def _as_map(y: Any, x: Tensor, model: nn.Module) -> Tensor:
    """A feature map or tokens as `[N,C,h,w]`."""
    if not isinstance(y, Tensor) or y.dim() not in (3, 4) or len(y) != len(x):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"features must be a map [{len(x)},C,h,w] or tokens [{len(x)},L,C], got {got}; pass features=, a function "
            "from images to such a tensor"
        )
    sides = x.shape[2], x.shape[3]
    if y.dim() == 3:
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        h, w = _grid(model, y.shape[1], prefix, sides)
        return y[:, prefix:].unflatten(1, (h, w)).permute(0, 3, 1, 2)
    _, a, b, c = y.shape
    if _alike((b, c), sides) or not _alike((a, b), sides):
        return y
    if getattr(model, "output_fmt", None) == "NHWC":
        return y.permute(0, 3, 1, 2)
    raise ValueError(
        f"features must be a map [N,C,h,w], and {list(y.shape)} for images {list(x.shape)} looks like [N,h,w,C]; pass "
        "features=, a function that permutes it with y.permute(0, 3, 1, 2)"
    )


def _alike(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether grid and image have the same proportions."""
    return grid[0] * image[1] == grid[1] * image[0]


def _grid(model: nn.Module, tokens: int, prefix: int, image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens that follow the prefix."""
    length = tokens - prefix
    embed = getattr(model, "patch_embed", None)
    by_size = getattr(embed, "dynamic_feat_size", None)
    grid = getattr(embed, "grid_size", None) if by_size is None else by_size(image)
    if grid is not None and math.prod(grid) == length:
        return int(grid[0]), int(grid[1])
    rows = math.isqrt(max(0, length) * image[0] // image[1])
    columns = length // max(1, rows)
    if rows * columns == length > 0 and _alike((rows, columns), image):
        return rows, columns
    raise ValueError(
        f"{tokens} tokens, the first {prefix} of them dropped (num_prefix_tokens), do not fill a grid of an image of "
        f"{image[0]}x{image[1]}; pass features=, a function that drops tokens outside the image and gives [N,C,h,w]"
    )


def _scaled(map: Tensor, scale: Scale) -> Tensor:
    scaled = (map + 1).log10() if scale == "log" else map
    return scaled / scaled.max()


def _squares(map: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the map's pixels and of the map's sum in centred squares of sides 1, 3, 5, ... up to the whole map."""
    rows, columns = ((torch.arange(n) - n // 2).abs() for n in map.shape)
    # the number of the square that has a pixel on its border
    square = torch.maximum(rows[:, None], columns).flatten()
    pixels, sums = (torch.bincount(square, weights.flatten()).cumsum(0) for weights in (torch.ones_like(map), map))
    return pixels / pixels[-1], sums / sums[-1]


def _side(map: Tensor, threshold: float) -> int | None:
    """Side 2i+1 of the smallest centred square, i from 1, that holds more than this share of the sum, or None."""
    _, shares = _squares(map)
    # as in the official code, the largest square leaves a border
    reached = (shares[1 : min(map.shape) // 2] > threshold).nonzero()
    return None if len(reached) == 0 else 2 * int(reached[0]) + 3
