"""Hardware settings of a training: processes, and how many images each computes at once."""

from dataclasses import dataclass

import torch

from replknet.train.recipe import check_at_most

# of a machine, and machines: the largest clusters have some ten thousand
_PROCESSES = 65_536


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Hardware settings. Up to rounding they do not change what is trained.

    Args:
        devices: number of processes on this machine, one a GPU; None: all GPUs, or one process on a CPU.
        nodes: number of machines; torchrun or SLURM starts one command on each.
        device_batch: number of images that a device computes at once; None: its whole share of a step. With fewer
            images, a step accumulates several batches.
        save_steps: number of steps from one state to the next within an epoch; None: a state only after each epoch.
        grad_checkpointing: recompute the activations of each block in the backward pass: less memory, one more forward
            pass.
        shard: divide weights, gradients and optimiser state among the processes (FSDP2), for networks that are too
            large for one device; not with an average of the weights.
        compile: run the network through torch.compile.
        log_steps: number of steps from one row of steps.csv to the next. Without a progress bar, the rows go to stderr,
            too.

    Raises:
        ValueError: a number is not positive.
    """

    devices: int | None = None
    nodes: int = 1
    device_batch: int | None = None
    save_steps: int | None = None
    grad_checkpointing: bool = False
    shard: bool = False
    compile: bool = False
    log_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "device_batch", "save_steps", "log_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        check_at_most(self, _PROCESSES, "devices", "nodes")

    @property
    def processes(self) -> int:
        return self.nodes * (self.devices or torch.cuda.device_count() or 1)

    def at_once(self, batch_size: int) -> int:
        """Number of images that a process computes at once."""
        return self.device_batch or max(1, batch_size // self.processes)

    def accumulated(self, batch_size: int) -> int:
        """Number of batches that each process accumulates in a step.

        Raises:
            ValueError: the images of a step cannot be divided among processes and batches.
        """
        at_once = self.processes * self.at_once(batch_size)
        if batch_size % at_once:
            at_a_time = "" if self.device_batch is None else f" with {self.device_batch} images at once"
            raise ValueError(
                f"batch_size {batch_size} cannot be divided among {self.processes} processes{at_a_time}: it must be a "
                f"multiple of {at_once if self.device_batch else self.processes}"
            )
        return batch_size // at_once
