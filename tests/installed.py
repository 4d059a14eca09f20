"""An installed package: its C++ core loads and computes. It needs no pytest, and runs away from the sources.

python tests/installed.py
"""

import itertools

import torch
from torch.nn.functional import conv2d

import replknet
from replknet.ops import depthwise_conv2d

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def main() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 20, 24, 18), torch.randn(20, 1, 31, 13)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    truth = conv2d(*wide, padding=(15, 6), groups=20)
    truths = [truth.detach(), *torch.autograd.grad(truth.sum(), wide)]
    worst = 0.0
    # by name, so that a missing core is an error and nothing else computes
    with replknet.use_backend("native"):
        for layout, algorithm in itertools.product(LAYOUTS, ("direct", "fft")):
            leaves = [x.contiguous(memory_format=layout).requires_grad_(), weight.clone().requires_grad_()]
            y = depthwise_conv2d(*leaves, algorithm=algorithm)
            found = [y.detach(), *torch.autograd.grad(y.sum(), leaves)]
            worst = max(worst, *map(relative, found, truths))
    print(f"replknet {replknet.__version__} in {replknet.__path__[0]}, torch {torch.__version__}")
    print(f"native kernel: {replknet.doctor().native}; relative error {worst:.1e}")
    if worst > 1e-5:
        raise SystemExit("the core computes something else than torch")


if __name__ == "__main__":
    main()
