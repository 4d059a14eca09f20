"""RepLKNet-31B as a whole on a CUDA device, with the Triton kernels and on torch's own convolution."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replknet.bench.gpu_layers import Timer, Wrong
from replknet.bench.harness import Record, Timing, quantiles_of
from replknet.kernels import use_backend
from replknet.nn import merge

# of the logits in bfloat16, relative L2
_BOUND = 5e-2
_INFERENCE_IMAGES = 64
_TRAINING_IMAGES = 32
_ROUNDS = 3
_CALLS = 4


def measure(
    device: str,
    timer: Timer,
    model: str = "replknet_31b",
    size: int = 224,
    images: tuple[int, int] = (_INFERENCE_IMAGES, _TRAINING_IMAGES),
    backends: tuple[str, ...] = ("triton", "aten"),
) -> Iterator[Record | Wrong]:
    """Inference of the merged network in bfloat16, and training steps under autocast, by backend and layout.

    Args:
        device: "cuda".
        timer: of a call.
        model: registered name.
        size: side of the images in pixels.
        images: of a batch, for inference and for training.
        backends: what to compare; aten is cuDNN or torch's own kernel on a GPU.
    """
    trained = timm.create_model(model, num_classes=1000).to(device)
    merged = merge(deepcopy(trained).eval()).bfloat16()
    x = torch.randn(max(images), 3, size, size, device=device)
    with torch.inference_mode(), use_backend("aten"):
        truth = merged(x[: images[0]].bfloat16()).float()
    for layout, form in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        merged, trained = merged.to(memory_format=form), trained.to(memory_format=form)
        few = x[: images[0]].bfloat16().contiguous(memory_format=form)
        batch = x[: images[1]].contiguous(memory_format=form)
        labels = torch.arange(images[1], device=device) % 1000
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-6)
        for backend in backends:
            with use_backend(backend), torch.inference_mode():
                found = merged(few).float()
            error = ((found - truth).norm() / truth.norm()).item()
            if not error <= _BOUND:
                yield Wrong(f"{model} {backend} {layout}", error)
                continue
            calls: dict[str, tuple[Callable[[], Any], int]] = {
                "inference": (partial(_infer, backend, merged, few), images[0]),
                "training step": (partial(_step, backend, trained, batch, labels, optimizer), images[1]),
            }
            for what, (call, count) in calls.items():
                yield Record(
                    suite="gpu.networks",
                    case=model,
                    shape=(count, 3, size, size),
                    kernel=None,
                    what=what,
                    way=f"{backend} {layout}",
                    backend=backend,
                    timing=timer(call),
                    excess=round(error / _BOUND, 3),
                )


def steady_time(call: Callable[[], Any]) -> Timing:
    """Time of one of several calls that follow each other without a wait, as in a training or a server."""
    for _ in range(2):  # compiles, and lets cuDNN choose
        call()
    times = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _CALLS)
    return quantiles_of(times)


def rows(found: list[Record | Wrong]) -> list[str]:
    """A line a way, with images a second and the ratio to the fastest of the other backends."""
    records = [one for one in found if isinstance(one, Record)]
    lines = [f"{one.way} WRONG by {one.error:.1e}, not timed" for one in found if isinstance(one, Wrong)]
    for one in records:
        others = [r.timing.p50_ms for r in records if r.what == one.what and r.backend != one.backend]
        ratio = f"{min(others) / one.timing.p50_ms:6.2f} x the fastest of the other" if others else ""
        assert one.shape is not None
        rate = 1e3 * one.shape[0] / one.timing.p50_ms
        lines.append(f"{one.case} {one.what:14} {one.way:12} {one.timing.p50_ms:9.2f} ms {rate:9.1f} images/s {ratio}")
    return lines


def _infer(backend: str, model: nn.Module, x: Tensor) -> None:
    with use_backend(backend), torch.inference_mode():
        model(x)


def _step(backend: str, model: nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.SGD) -> None:
    model.train()
    with use_backend(backend):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
