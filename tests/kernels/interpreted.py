"""The Triton kernels in Triton's interpreter, against the float64 definition: run by test_triton.py in a process.

All groups run one after the other in this process. Each case prints a line of JSON: its group, its name and the
largest errors as multiples of the bound. `--full` adds the rest of the matrix.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import interpreted_plane
import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from oracle import excess
from replknet.kernels import (
    prepared,
    reference,
    triton,
    triton_check,
    triton_choice,
    triton_layout,
    triton_run,
    triton_strips,
    use_backend,
)
from replknet.kernels.triton_plan import DirectTile, PatchTile, Tile
from replknet.nn import DepthwiseConv2d

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

# (n, c, h, w, kh, kw), dtype, channels_last, tile of the forward pass, of the gradient
Case = tuple[tuple[int, int, int, int, int, int], torch.dtype, bool, Tile, Tile]

# how far beyond the outputs that see a pixel its infinity may go: docs/operator.md
ROWS_BEYOND, COLUMNS_BEYOND = 6, 22

PATCH: list[Case] = [
    # images as samples, with row blocks beside them
    ((18, 2, 7, 7, 13, 13), BRAIN, True, PatchTile(samples=64, heights=2), PatchTile(samples=16, splits=2)),
    # few images: pairs of an image and a row block
    ((1, 2, 9, 11, 7, 7), BRAIN, False, PatchTile(samples=16, by_image=False), PatchTile(samples=16, by_image=False)),
    # a kernel of more column blocks than are held at once
    ((1, 1, 3, 90, 1, 127), HALF, False, PatchTile(samples=16), PatchTile(samples=16, by_image=False)),
    # a width that is padded
    ((2, 1, 6, 19, 5, 9), HALF, True, PatchTile(samples=16, patches=2), PatchTile(samples=16)),
    # patches of two rows, as for TF32: the interpreter multiplies in float32
    ((5, 1, 6, 7, 11, 13), FLOAT, True, PatchTile(samples=16, rows=2, by_image=False), PatchTile(samples=16, rows=2)),
    ((1, 1, 1, 1, 1, 1), HALF, False, PatchTile(samples=16), PatchTile(samples=16)),
    # the same kernels for maps of all sizes
    (
        (2, 1, 7, 21, 5, 19),
        HALF,
        True,
        PatchTile(samples=16, by_image=False, patches=2, any_size=True),
        PatchTile(samples=16, by_image=False, patches=2, any_size=True),
    ),
]
MORE_PATCH: list[Case] = [
    # the shapes of RepLKNet
    ((17, 1, 14, 14, 27, 27), HALF, False, PatchTile(samples=32, heights=2), PatchTile(samples=16)),
    ((3, 1, 28, 28, 29, 29), HALF, True, PatchTile(samples=16), PatchTile(samples=16, rows=2)),
    (
        (2, 1, 13, 35, 9, 31),
        HALF,
        False,
        PatchTile(samples=16, by_image=False, patches=2, near=False),
        PatchTile(samples=16, by_image=False, patches=2, splits=3),
    ),
    # several tiles along a row
    ((2, 1, 5, 70, 31, 17), HALF, False, PatchTile(samples=16, patches=2), PatchTile(samples=16, patches=2)),
    ((2, 1, 40, 5, 51, 3), BRAIN, True, PatchTile(samples=16), PatchTile(samples=16, splits=2)),
    ((2, 2, 10, 20, 9, 9), FLOAT, False, PatchTile(samples=16, rows=2), PatchTile(samples=16, rows=2)),
    (
        (3, 2, 9, 9, 7, 7),
        BRAIN,
        False,
        PatchTile(samples=16, patches=2, any_size=True),
        PatchTile(samples=16, patches=2, any_size=True),
    ),
]
DIRECT: list[Case] = [
    ((2, 5, 6, 5, 3, 7), FLOAT, True, DirectTile(samples=16, rows=2, channels=4), DirectTile(splits=2)),
    ((3, 3, 4, 5, 3, 3), BRAIN, True, DirectTile(samples=64, rows=4, channels=4), DirectTile(splits=3)),
    ((1, 1, 1, 1, 1, 1), FLOAT, False, DirectTile(samples=16, rows=2), DirectTile()),
]
MORE_DIRECT: list[Case] = [
    ((2, 2, 9, 11, 5, 5), FLOAT, False, DirectTile(samples=64, rows=4), DirectTile()),
    ((1, 2, 7, 7, 13, 13), HALF, False, DirectTile(samples=8, rows=8), DirectTile()),
    ((1, 1, 3, 80, 1, 41), FLOAT, False, DirectTile(samples=128, rows=4), DirectTile(splits=2)),
    ((2, 1, 20, 3, 35, 5), FLOAT, False, DirectTile(samples=8, rows=8), DirectTile()),
    (
        (2, 3, 5, 6, 3, 3),
        BRAIN,
        True,
        DirectTile(samples=16, channels=4, rows=2),
        DirectTile(),
    ),
]


LAYOUTS = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 70, 5, 7)]
MORE_LAYOUTS = [(1, 1, 5, 7), (2, 3, 1, 1), (3, 70, 1, 1), (1, 1, 9, 40), (2, 3, 9, 40), (3, 70, 9, 40)]


def say(group: str, name: object, found: dict[str, float] | None = None) -> None:
    print(json.dumps([group, str(name), found or {}]), flush=True)


def layouts(full: bool) -> None:
    """Copies between layouts and widths are exact, and fill with zeros."""
    for shape in LAYOUTS + (MORE_LAYOUTS if full else []):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(HALF).contiguous(memory_format=layout)
            w = x.shape[3]
            for width in (w, w + 3):
                last = not x.is_contiguous()
                planes = triton_layout.copy(shape, width, last, False)(x)
                assert planes.is_contiguous(), (shape, width)
                assert torch.equal(planes, pad(x, (0, width - w))), (shape, width)
                back = triton_layout.copy((*shape[:3], width), w, False, last)(planes)
                expected = torch.channels_last if last else torch.contiguous_format
                assert back.stride() == torch.empty(shape, memory_format=expected).stride(), (shape, width)
                assert torch.equal(back, x), (shape, width)
        say("layouts", shape)


def roads(full: bool) -> None:
    """The operator with these kernels under everything that PyTorch puts around an operator; float32 to rounding."""
    module = DepthwiseConv2d(2, 5)
    x = torch.randn(2, 2, 6, 7, requires_grad=True)
    expected = reference.forward(x.double(), module.weight.double(), module.bias.double(), False).float()
    expected.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]

    def check(name: str, call: Callable[[torch.Tensor], torch.Tensor], bound: float = 1e-4) -> None:
        x.grad = None
        module.zero_grad()
        y = call(x)
        torch.testing.assert_close(y.float(), expected, rtol=bound, atol=bound)
        if y.requires_grad:
            y.float().square().sum().backward()
            for found, wanted in zip((x.grad, *(p.grad for p in module.parameters())), gradients, strict=True):
                torch.testing.assert_close(found, wanted, rtol=10 * bound, atol=10 * bound * wanted.abs().max().item())
        say("roads", name)

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=HALF):
            return module(x)

    def inference(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(x)

    with use_backend("triton"):
        check("eager", module)
        check("autocast", autocast, 1e-2)
        check("inference mode", inference)
        check("channels_last", lambda x: module(x.contiguous(memory_format=torch.channels_last)))
        if full:
            check("compile", torch.compile(module, fullgraph=True, backend="aot_eager"))
            check("checkpointing", lambda x: checkpoint(module, x, use_reentrant=False))
            with tempfile.TemporaryDirectory() as folder:
                meeting = f"file://{folder}/meeting"
                torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
                check("DDP", torch.nn.parallel.DistributedDataParallel(module))
                torch.distributed.destroy_process_group()


def strips(full: bool) -> None:
    """Strips that are kept with a weight follow it, however it is changed; a weight that learns has none."""
    tile = PatchTile(samples=16)
    x = torch.randn(2, 2, 9, 11).to(HALF)
    weight = torch.randn(2, 1, 7, 7).to(HALF)

    def check(name: str) -> None:
        y = triton_run.run(tile, x, weight, None, False)
        expected = reference.forward(x, weight.detach(), None, False)
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
        say("strips", name)

    here = threading.get_ident()
    assert triton_strips.apart(threading.get_ident, weight, 0) != here
    check("first")
    assert prepared.held_bytes() == 0  # it may have been a passing copy
    for name in ("second", "third"):
        check(name)
        assert prepared.held_bytes() > 0
    # what no counter of versions sees
    weight.data[1, 0, 6, 6] += 1
    check("changed through .data")
    weight.numpy()[0, 0, 0, 0] = 5
    check("changed through numpy")
    weight.data[0, 0, 3] = -0.0
    check("zeros")
    weight.data[0, 0, 3] = 0.0
    check("zeros of the other sign")
    weight.data.copy_(torch.randn(2, 1, 7, 7))
    check("all of it")
    size = prepared.held_bytes()
    dx = triton_run.run(tile, x, weight, None, False, rotated=True)
    torch.testing.assert_close(dx, reference.forward(x, weight.flip(2, 3), None, False), rtol=1e-2, atol=1e-2)
    assert prepared.held_bytes() == size
    del weight
    assert prepared.held_bytes() == 0
    weight = torch.randn(2, 1, 7, 7).to(HALF).requires_grad_()
    for _ in range(3):
        check("learns")
    assert prepared.held_bytes() == 0
    with torch.inference_mode():
        for _ in range(3):
            check("inference mode")
        assert prepared.held_bytes() > 0


def compared(full: bool) -> None:
    """The comparison with the definition that the default makes before it trusts a kernel."""
    calls = [
        ("forward", PATCH[0][3], triton_run.work_of(torch.empty(18, 2, 7, 7, dtype=BRAIN), (13, 13), True, True)),
        (
            "forward",
            PatchTile(samples=16, by_image=False),
            triton_run.work_of(torch.empty(1, 9, 30, 44, dtype=HALF), (9, 5)),
        ),
        ("dx", PatchTile(samples=16), triton_run.work_of(torch.empty(1, 2, 6, 6, dtype=HALF), (5, 5), rotated=True)),
        ("dw", PatchTile(samples=16), triton_run.work_of(torch.empty(1, 2, 6, 9, dtype=BRAIN), (5, 7))),
        ("dw", DirectTile(), triton_run.work_of(torch.empty(1, 2, 6, 9), (5, 7))),
    ]
    more = [
        ("forward", PatchTile(samples=16, rows=2), triton_run.work_of(torch.empty(1, 2, 9, 9), (7, 7))),
        (
            "forward",
            DirectTile(samples=32, channels=2, rows=2),
            triton_run.work_of(
                torch.empty(1, 9, 30, 44, dtype=HALF).contiguous(memory_format=torch.channels_last), (3, 3)
            ),
        ),
    ]
    run_of, gradient_of = triton_check.run_of, triton_check.gradient_of
    for direction, tile, work in calls + (more if full else []):
        assert triton_check.excess(direction, tile, work, torch.device("cpu")) <= 1, (direction, tile)
        # wrong in one place, by two roundings
        eps = torch.finfo(work.dtype).eps
        triton_check.run_of = lambda *a, e=eps: lambda *b: slightly_wrong(run_of(*a)(*b), e)
        triton_check.gradient_of = lambda *a, e=eps: lambda *b: slightly_wrong(gradient_of(*a)(*b), e)
        assert triton_check.excess(direction, tile, work, torch.device("cpu")) > 1, (direction, tile)
        triton_check.run_of, triton_check.gradient_of = run_of, gradient_of
        say("compared", f"{direction} {tile}")


def slightly_wrong(y: torch.Tensor, eps: float) -> torch.Tensor:
    largest = torch.unravel_index(y.abs().argmax(), y.shape)
    y[largest] *= 1 + (8 if eps > 1e-5 else 2000) * eps
    return y


def infinity(full: bool) -> None:
    """An infinity in one pixel stays in its image, its channel and its neighbourhood; in dw, in its channel."""
    k = 7
    tiles: list[tuple[torch.dtype, Tile]] = [
        (HALF, PatchTile(samples=16)),
        (HALF, PatchTile(samples=16, by_image=False)),
        (BRAIN, PatchTile(samples=16, patches=2, any_size=True)),
    ]
    more = [(FLOAT, PatchTile(samples=16, rows=2)), (FLOAT, DirectTile(samples=64, rows=4))]
    for dtype, tile in tiles + (more if full else []):
        for where in ((0, 0), (8, 17)):
            x, dy = (torch.randn(2, 2, 10, 40).to(dtype) for _ in range(2))
            x[1, 1, *where] = float("inf")
            weight = torch.randn(2, 1, k, k).to(dtype)
            y = triton_run.run(tile, x, weight, None, False)
            assert y[0].isfinite().all()
            assert y[1, 0].isfinite().all()
            away = ((~y[1, 1].isfinite()).nonzero() - torch.tensor(where)).abs()
            assert (away <= k // 2).all(1).any()
            assert (away <= torch.tensor([k // 2 + ROWS_BEYOND, k // 2 + COLUMNS_BEYOND])).all()
            dw = triton_run.run_gradient(tile, dy, x, k, k)
            assert dw[0].isfinite().all()
            say("infinity", f"{dtype} {tile} {where}")


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (n, c, h, w, kh, kw), dtype, channels_last, _, _ = case
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    return x, (torch.randn(c, 1, kh, kw) / max(kh, kw)).to(dtype), dy


def kernels(group: str, cases: list[Case]) -> None:
    """y, dx, dw and db keep the bound, and y with bias and ReLU."""
    tiles = triton_choice.forward_tiles, triton_choice.gradient_tiles
    for case in cases:
        x, weight, dy = tensors(case)
        # as the plan would give them, but small
        triton_choice.forward_tiles = lambda *_, tile=case[3]: (tile,)
        triton_choice.gradient_tiles = lambda *_, tile=case[4]: (tile,)
        found = excess(triton.BACKEND, x, weight, dy)
        bias = torch.randn(x.shape[1]).to(x.dtype)
        y = triton.BACKEND.forward(x, weight, bias, True, "auto")
        expected = reference.forward(x.double(), weight.double(), bias.double(), True)
        eps = torch.finfo(x.dtype).eps
        scale = 1e-5 * expected.abs().max() + eps * expected.abs()
        found["bias and relu"] = ((y.double() - expected).abs() / (scale + 1e-9)).max().item()
        say(group, case, found)
    triton_choice.forward_tiles, triton_choice.gradient_tiles = tiles


def plane(full: bool) -> None:
    for name, found in interpreted_plane.errors_of(full):
        say("plane", name, found)


def main(full: bool) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    # first, while nothing is kept with any weight
    strips(full)
    layouts(full)
    compared(full)
    infinity(full)
    kernels("patch", PATCH + (MORE_PATCH if full else []))
    kernels("direct", DIRECT + (MORE_DIRECT if full else []))
    roads(full)
    # last: what reads beyond its memory ends the process
    plane(full)


if __name__ == "__main__":
    main("--full" in sys.argv)
