"""The whole RepLKNet-31B on a CUDA device, by backend, and two networks of its size without large kernels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from replknet.bench.gpu_layers import Timer, Wrong, cudnn_trials, once
from replknet.bench.records import Record
from replknet.kernels import use_backend
from replknet.nn import merge
from replknet.timing import Timing, quantiles_of

# registered name -> ways of running it. "default": the backend is chosen automatically. "torch": the network does not
# use our operator
NETWORKS: dict[str, tuple[str, ...]] = {
    "replknet_31b": ("default", "triton", "aten"),
    "swin_base_patch4_window7_224": ("torch",),
    "convnext_base": ("torch",),
}
# images in a batch
IMAGES = (64, 32)
# allowed relative L2 error of the logits in bfloat16
_BOUND = 5e-2
_ROUNDS = 3
_CALLS = 4
_CHOICE_LEFT_FREE = ("default", "torch")


def measure(
    model: str,
    ways: Sequence[str],
    images: Sequence[int],
    device: str,
    timer: Timer,
    size: int = 224,
    **options: Any,
) -> Iterator[Record | Wrong]:
    """Inference of the merged network in bfloat16, and training steps under autocast, in channels_last.

    Args:
        model: registered name.
        ways: "default", "torch", or a backend to force. On a GPU, aten is cuDNN or torch's own kernel.
        images: images in a batch; inference and training are timed with each number.
        device: "cuda".
        timer: times a call.
        size: side of the images, pixels.
        options: options of the model.
    """
    form = torch.channels_last
    trained = timm.create_model(model, num_classes=1000, **options).to(device).to(memory_format=form)
    merged = merge(trained.eval()).bfloat16().to(memory_format=form)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-6)
    for count in images:
        x = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=form)
        labels = torch.arange(count, device=device) % 1000
        truth = _logits("aten", merged, x.bfloat16())
        for way in ways:
            calls: dict[str, Callable[[], Any]] = {
                "inference": partial(_logits, way, merged, x.bfloat16()),
                "training step": partial(_step, way, trained, x, labels, optimizer),
            }
            with cudnn_trials(_largest_kernel(trained)):
                found = calls["inference"]()
                error = ((found - truth).norm() / truth.norm()).item()
                times = {what: timer(call) for what, call in calls.items()} if error <= _BOUND else {}
            if not error <= _BOUND:
                yield Wrong(f"{model} {way} nhwc", error)
            for what, timing in times.items():
                yield Record(
                    suite="gpu.networks",
                    case=model,
                    shape=tuple(x.shape),
                    kernel=None,
                    what=what,
                    way=f"{way} nhwc",
                    backend=way,
                    timing=timing,
                    excess=round(error / _BOUND, 3),
                )


def compile_network(model: str, images: int, way: str = "triton", device: str = "cuda", size: int = 224) -> None:
    """Call the kernels of a RepLKNet once, in a copy with one block a stage: other blocks use the same kernels."""
    list(measure(model, (way,), (images,), device, once, size, depths=(1, 1, 1, 1)))


def steady_time(call: Callable[[], Any]) -> Timing:
    """The time a call, over several calls without a wait between them, as in a training or a server."""
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
    """One line a way, with images a second and the ratio to the network on torch's own convolution."""
    records = [one for one in found if isinstance(one, Record)]
    lines = [f"{one.way} WRONG by {one.error:.1e}, not timed" for one in found if isinstance(one, Wrong)]
    torchs = {(r.case, r.shape, r.what): r.timing.p50_ms for r in records if r.backend in ("aten", "torch")}
    for one in records:
        torch_ms = torchs.get((one.case, one.shape, one.what))
        ratio = "" if torch_ms is None else f"{torch_ms / one.timing.p50_ms:6.2f} x torch's convolution"
        assert one.shape is not None
        rate = 1e3 * one.shape[0] / one.timing.p50_ms
        lines.append(
            f"{one.case} {one.what:14} N={one.shape[0]:<3} {one.way:12} {one.timing.p50_ms:9.2f} ms "
            f"{rate:9.1f} images/s {ratio}"
        )
    return lines


def _largest_kernel(model: nn.Module) -> int:
    return max(max(module.kernel_size) for module in model.modules() if isinstance(module, nn.Conv2d))


def _logits(way: str, model: nn.Module, x: Tensor) -> Tensor:
    with use_backend(None if way in _CHOICE_LEFT_FREE else way), torch.inference_mode():
        y: Tensor = model(x)
        return y.float()


def _step(way: str, model: nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.SGD) -> None:
    model.train()
    with use_backend(None if way in _CHOICE_LEFT_FREE else way):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
