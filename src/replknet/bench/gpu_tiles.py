"""Times of each tile that the autotuner may try: the shipped tiles should be the fastest."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from replknet.bench.cases import Case
from replknet.bench.gpu_layers import Timer, Wrong, image_error, once, tensors, truth_of, weight_error
from replknet.bench.records import Record
from replknet.kernels import triton_run
from replknet.kernels.triton_plan import Tile, family, forward_tiles, gradient_tiles

DTYPE = torch.bfloat16
_BOUND = 1.6e-2
_LAYERS = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
CASES = (
    *(Case(f"31b.{h}.n{n}", (n, c, h, h), k) for n in (64, 32) for c, h, k in _LAYERS),
    *(Case(f"31b.{h}.n1", (1, c, h, h), k) for c, h, k in ((128, 56, 31), (512, 14, 27))),
    Case("convnext.56.n64", (64, 96, 56, 56), 7),
)


def measure(case: Case, device: str, timer: Timer) -> Iterator[Record | Wrong]:
    """For each tile of a case: its time, forward or for the weight gradient, or what is wrong with it."""
    x, dy, weight = tensors(case, DTYPE, device)
    chosen, (y, _, dw) = truth_of(dy, x, weight)
    assert y is not None
    assert dw is not None
    side = min(case.kernel, 2 * x.shape[2] - 1)
    capability = torch.cuda.get_device_capability() if x.is_cuda else (9, 0)
    facts = case.shape, (side, side), DTYPE, False
    calls: dict[str, tuple[tuple[Tile, ...], Callable[[Tile], Tensor], Callable[[Tensor], float]]] = {
        "forward": (
            forward_tiles(*facts, False, family(capability)),
            lambda tile: triton_run.run(tile, x, weight, None, False),
            lambda found: image_error(found, chosen, y),
        ),
        "weight gradient": (
            gradient_tiles(*facts, family(capability)),
            lambda tile: triton_run.run_gradient(tile, dy, x, side, side),
            lambda found: weight_error(found, chosen, dw),
        ),
    }
    for what, (tiles, run, error_of) in calls.items():
        for i, tile in enumerate(tiles):
            way = f"{i}: {tile}"
            error = error_of(run(tile))
            if not error <= _BOUND:
                yield Wrong(f"{case.name} {what} {way}", error)
                continue
            yield Record(
                suite="gpu.tiles",
                case=case.name,
                shape=case.shape,
                kernel=case.kernel,
                what=what,
                way=way,
                backend="triton",
                timing=timer(partial(run, tile)),
                excess=round(error / _BOUND, 3),
                flops=case.flops,
                useful_flops=case.useful_flops,
            )


def compile_case(case: Case, device: str = "cuda") -> None:
    """Call every tile of a case once."""
    list(measure(case, device, once))


def rows(case: Case, found: list[Record | Wrong]) -> list[str]:
    """One line a tile; the first of each direction ships."""
    lines = [f"tiles of {case.name}"]
    for one in found:
        if isinstance(one, Wrong):
            lines.append(f"  WRONG by {one.error:.1e}: {one.way}")
        else:
            lines.append(f"  {one.what:16} {1e3 * one.timing.p50_ms:10.1f} us  {one.way}")
    return lines
