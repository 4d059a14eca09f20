"""What a training needs before anyone pays for it: memory of a device, and steps."""

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
from replknet.train.optimisers import fallback_of
from replknet.train.recipe import Recipe

# share of a device's memory that the tensors may take; libraries, fragments and what a framework keeps take some, too
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Memory of a device at the worst moment of a step, in bytes."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    average: int  # of the weights
    buckets: int  # copies of the gradients that processes exchange
    activations: int  # everything else: what the backward pass needs, and images

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.activations


@dataclass(frozen=True)
class Estimate:
    """How a recipe fits a machine."""

    device_batch: int  # images that a device takes at once
    accumulate: int  # batches of a device that make a step
    epochs: int
    steps_per_epoch: int
    steps: int
    memory: Memory
    fits: bool
    by_device_batch: dict[int, int]  # other choices and their bytes, extrapolated from two


def estimate(
    recipe: Recipe,
    train: Train,
    hardware: Hardware,
    images: int,
    classes: int,
    device_memory: float | None = None,
) -> Estimate:
    """Memory and steps of a training, from a step on tensors that have shapes alone.

    Args:
        recipe: the training.
        machine: its processes; `device_batch` None takes the largest that fits, or all images if no memory is given.
        images: in the training set.
        classes: outputs of the network.
        device_memory: of a device, in GB (1e9 bytes).

    Raises:
        ValueError: the images of a step cannot be divided so, or the weights are to be divided, which is not counted.
    """
    check_model(recipe.model)
    if hardware.shard:
        raise ValueError("whole weights are counted on every device; what --shard saves is not known, leave it out")
    per_process, rest = divmod(recipe.batch_size, hardware.processes)
    if rest or per_process == 0:
        hardware.accumulated(recipe.batch_size)  # says what is wrong
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
    """Memory of one step with so many images on a device, without torch.compile.

    Forward and backward pass run on fake tensors, and torch's tracker counts the storages that live at once. What the
    optimiser's own step takes beside its state comes when the activations are gone. Scratch memory inside an operator
    is not seen.
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
        # those of the batches before it lie there while a batch is accumulated
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
    """Bytes of an optimiser's state: each parameter's, times its copies in the state of a small stand-in."""
    with unset_fake_temporarily():
        # what an optimiser does depends on the form alone; Muon refuses matrices with fewer than 4 rows
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
    """Lightning's mixed precision of that name, on a kind of device."""
    dtype = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        yield
