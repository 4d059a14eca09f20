"""Estimates before a training: memory of a device, and number of steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker

from replknet.train.hardware import Hardware
from replknet.train.job import Train, check_model
from replknet.train.optimisers import check_optimizer, fallback_of
from replknet.train.recipe import Recipe

# share of a device's memory that tensors may take; libraries, fragments and the framework need the rest
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Memory of a device at the peak of a step, in bytes."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    average: int  # average of the weights
    buckets: int  # copies of the gradients that processes exchange
    activations: int  # everything else: activations for the backward pass, and images

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.activations


@dataclass(frozen=True)
class Estimate:
    """How a recipe fits a machine."""

    device_batch: int  # images that a device computes at once
    accumulate: int  # batches that a device accumulates in a step
    epochs: int
    steps_per_epoch: int
    steps: int
    memory: Memory
    fits: bool
    by_device_batch: dict[int, int]  # possible device_batch -> bytes, extrapolated from two of them


def estimate(
    recipe: Recipe,
    train: Train,
    hardware: Hardware,
    images: int,
    classes: int,
    device_memory: float | None = None,
) -> Estimate:
    """Memory and steps of a training. The memory comes from a step on fake tensors, which have shapes but no data.

    Args:
        recipe: the training.
        train: the training of the recipe's task.
        hardware: its processes. If `device_batch` is None, the largest one that fits is taken, or all images of the
            process if no memory is given.
        images: number of images in the training set.
        classes: number of outputs of the network.
        device_memory: memory of a device, GB (1e9 bytes).

    Raises:
        ValueError: the images of a step cannot be divided among the processes, a process has too few of them, or
            `hardware.shard` is set, which the estimate does not count.
    """
    check_model(recipe.model)
    check_optimizer(recipe.optimizer)
    if hardware.shard:
        raise ValueError("whole weights are counted on every device: the estimate does not know --shard, leave it out")
    per_process, rest = divmod(recipe.batch_size, hardware.processes)
    if rest or per_process == 0:
        hardware.accumulated(recipe.batch_size)  # raises the error
    choices = [n for n in range(1, per_process + 1) if per_process % n == 0]
    refused = train.refusal(recipe, hardware, hardware.at_once(recipe.batch_size))
    if refused is not None:
        raise ValueError(refused)
    choices = [n for n in choices if train.refusal(recipe, hardware, n) is None]
    small, large = choices[max(0, len(choices) // 2 - 1)], choices[len(choices) // 2]
    known = {n: step_memory(recipe, train, hardware, n, classes).total for n in {small, large}}
    slope = (known[large] - known[small]) / (large - small) if large > small else 0.0
    estimated = {n: known.get(n, round(known[small] + slope * (n - small))) for n in choices}
    limit = None if device_memory is None else USABLE * device_memory * 1e9
    device_batch = hardware.device_batch
    if device_batch is None:
        fitting = [n for n in choices if limit is None or estimated[n] <= limit]
        device_batch = max(fitting, default=1)
    memory = step_memory(recipe, train, hardware, device_batch, classes)
    steps_per_epoch = images // recipe.batch_size
    epochs = recipe.epochs_of(images)
    return Estimate(
        device_batch=device_batch,
        accumulate=Hardware(devices=hardware.devices, nodes=hardware.nodes, device_batch=device_batch).accumulated(
            recipe.batch_size
        ),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        steps=steps_per_epoch * epochs,
        memory=memory,
        fits=limit is None or memory.total <= limit,
        by_device_batch=estimated,
    )


def step_memory(recipe: Recipe, train: Train, hardware: Hardware, images: int, classes: int) -> Memory:
    """Memory of one step with this number of images on a device, without torch.compile.

    Forward and backward pass run on fake tensors, and torch's tracker counts the storages that live at once. Temporary
    memory of the optimiser's step does not count, since the activations are gone by then. Temporary memory inside an
    operator is not seen.
    """
    assert train.step is not None
    with FakeTensorMode():
        step = train.step(recipe, hardware, images, classes)
        model = step.model
        tracker = MemTracker()
        tracker.track_external(model, step.x, step.target)
        with tracker:
            with autocast(recipe.precision):
                value = step.loss(model, step.x, step.target)
            value.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        weights = sum(_bytes(t) for t in (*model.parameters(), *model.buffers()))
        parameters = sum(_bytes(p) for p in model.parameters())
        state = _state_of(model, recipe.optimizer)
    gradients = next(size for kind, size in peak.items() if str(kind).endswith("GRAD"))
    if images * hardware.processes < recipe.batch_size:
        # while a batch is accumulated, the gradients of the batches before it stay in memory
        gradients, peak["Total"] = parameters, peak["Total"] + parameters - gradients
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        average=weights if step.average else 0,
        buckets=parameters if hardware.processes > 1 else 0,
        activations=peak["Total"] - weights - gradients,
    )


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _state_of(model: nn.Module, optimizer: str) -> int:
    """Bytes of an optimiser's state. A step on small parameters tells how many copies of each the state keeps."""
    with unset_fake_temporarily():
        # sides from 4 on do not change the number of copies; timm's Muon leaves smaller ones to AdamW
        small = {
            name: nn.Parameter(torch.zeros([min(side, 4) for side in p.shape])) for name, p in model.named_parameters()
        }
        other = fallback_of(model, optimizer).get("fallback_list", list(small))
        groups = [
            {"params": [p for name, p in small.items() if (name in other) == fallback], "use_fallback": fallback}
            for fallback in (True, False)
        ]
        stepped = create_optimizer_v2([group for group in groups if group["params"]], optimizer, lr=0.1)
        for p in small.values():
            p.grad = torch.zeros_like(p)
        stepped.step()
        copies = {
            name: sum(isinstance(t, Tensor) and t.shape == p.shape for t in stepped.state[p].values())
            for name, p in small.items()
        }
    return sum(copies[name] * _bytes(p) for name, p in model.named_parameters())


@contextmanager
def autocast(precision: str, device: str = "cpu") -> Iterator[None]:
    """Autocast as in Lightning's precision of this name, on this kind of device."""
    dtype = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        yield
