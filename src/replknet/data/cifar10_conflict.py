"""Our own texture-shape conflicts from CIFAR-10's test images; they are not the stimuli of Geirhos et al.

An image is split into two parts (Meyer 2001, "Oscillating Patterns in Image Processing and Nonlinear Evolution
Equations"). The cartoon has the large regions with sharp outlines (Rudin, Osher and Fatemi 1992). The texture is the
rest. A conflict is the cartoon of one image plus the texture of another. The patches of the texture change places, so
that it keeps fine detail and loses outlines. docs/shape-bias.md checks that both can be recognised.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from replknet.data.cifar10 import CLASSES, Arrays
from replknet.data.sampling import number

# strength of the split, grey levels: a larger value moves more of the image into the texture
STRENGTH = 60.0
# side of the texture patches that change places, pixels
PATCH = 8

# after these steps at STRENGTH, the cartoon is 0.6 grey levels (root mean square) from its limit
_STEPS = 40
# images at a time, so that their arrays stay in the processor's cache
_CHUNK = 50


@dataclass(frozen=True)
class Conflicts:
    """Images with the shape of one class and the texture of another.

    Args:
        images: `[N,3,32,32]`, uint8.
        shapes: class of the shape, `[N]`, int64.
        textures: class of the texture, `[N]`.
        shape_cues: the shape part of each image, `[N,3,32,32]`, uint8.
        texture_cues: the texture part on mid-grey, `[N,3,32,32]`, uint8.
    """

    images: Tensor
    shapes: Tensor
    textures: Tensor
    shape_cues: Tensor
    texture_cues: Tensor


def conflicts(arrays: Arrays, each: int = 100, seed: int = 0) -> Conflicts:
    """Make conflicts from CIFAR-10's test images, equally many for each ordered pair of different classes.

    Args:
        arrays: what `cifar10.load` returns.
        each: images a pair of classes; there are 90 pairs. Up to a ninth of a class's images, no image gives its
            shape or its texture twice.
        seed: seed of the pairs and of the patches' places.

    Returns:
        The images, ordered by shape class and then by texture class. A seed always gives identical images.

    Raises:
        ValueError: `each` is not positive, or a class has no test images.
    """
    if each < 1:
        raise ValueError(f"there must be at least one image a pair of classes, got {each}")
    generator = torch.Generator().manual_seed(number(seed) % 2**63)
    labels = arrays["test_labels"]
    for_shape, for_texture = _queues(labels, each, generator), _queues(labels, each, generator)
    pairs = [(s, t) for s in range(len(CLASSES)) for t in range(len(CLASSES)) if s != t]
    # the k-th of the nine other classes takes the k-th part of the queue
    a = torch.cat([for_shape[s][t - (t > s)] for s, t in pairs])
    b = torch.cat([for_texture[t][s - (s > t)] for s, t in pairs])
    used, where = torch.cat([a, b]).unique(return_inverse=True)
    pictures = arrays["test_images"][used].float()
    drawn = cartoons(pictures)
    shape, texture = drawn[where[: len(a)]], (pictures - drawn)[where[len(a) :]]
    texture = shuffled(texture, torch.rand(len(b), (32 // PATCH) ** 2, generator=generator).argsort(1))
    return Conflicts(_pixels(shape + texture), labels[a], labels[b], _pixels(shape), _pixels(texture + 128))


def _queues(labels: Tensor, each: int, generator: torch.Generator) -> list[Tensor]:
    """For each class its images in random order, repeated until there are enough: indices `[9,each]`."""
    queues = []
    for label, name in enumerate(CLASSES):
        own = (labels == label).nonzero()[:, 0]
        if not len(own):
            raise ValueError(f"the test split has no image of class {name}")
        own = own[torch.randperm(len(own), generator=generator)]
        queues.append(own.repeat(math.ceil(9 * each / len(own)))[: 9 * each].view(9, each))
    return queues


def _pixels(x: Tensor) -> Tensor:
    return x.clamp(0, 255).round().to(torch.uint8)


def cartoons(x: Tensor, strength: float = STRENGTH) -> Tensor:
    """Images without their texture: u that minimises TV(u) + |u - x|^2 / (2 strength), over all channels together.

    Args:
        x: images `[N,C,H,W]`, float, grey levels.
        strength: grey levels; a larger value leaves less of the image.

    Returns:
        `[N,C,H,W]`, after a fixed number of steps.

    Source: Rudin, Osher and Fatemi 1992, "Nonlinear total variation based noise removal algorithms". The solver is
        fast gradient projection on the dual: Beck and Teboulle 2009, "Fast gradient-based algorithms for constrained
        total variation image denoising and deblurring problems".
    """
    return torch.cat([_cartoon(part, strength) for part in x.split(_CHUNK)])


def _cartoon(x: Tensor, strength: float) -> Tensor:
    dual = looked_at = x.new_zeros(2, *x.shape)
    t = 1.0
    for _ in range(_STEPS):
        # 8 is the largest eigenvalue of the divergence of the gradient
        moved = looked_at + _gradient(x + strength * _divergence(looked_at)) / (8 * strength)
        # project onto the unit ball at each pixel
        moved = moved / moved.square().sum((0, 2), keepdim=True).sqrt().clamp(min=1)
        faster = (1 + math.sqrt(1 + 4 * t * t)) / 2
        looked_at = moved + (t - 1) / faster * (moved - dual)
        dual, t = moved, faster
    return x + strength * _divergence(dual)


def _gradient(u: Tensor) -> Tensor:
    """Differences to the pixel below and to the pixel on the right, zero at the border: `[2,N,C,H,W]`."""
    return torch.stack([pad(u.diff(dim=2), (0, 0, 0, 1)), pad(u.diff(dim=3), (0, 1))])


def _divergence(p: Tensor) -> Tensor:
    """Minus the adjoint of `_gradient`, for fields that are zero at the border as a gradient is."""
    down, right = p
    return down - pad(down[..., :-1, :], (0, 0, 1, 0)) + right - pad(right[..., :-1], (1, 0))


def shuffled(x: Tensor, places: Tensor) -> Tensor:
    """Images whose square patches have changed places.

    Args:
        x: `[N,C,H,W]`, sides a multiple of `PATCH`.
        places: `[N,patches]`, a permutation for each image: for each place, row by row, the patch that moves there.
    """
    n, c, h, w = x.shape
    patches = (
        x.view(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c, PATCH, PATCH)
    )
    patches = patches[torch.arange(n)[:, None], places]
    return patches.view(n, h // PATCH, w // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
