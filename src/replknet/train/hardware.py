"""On what a training runs: processes and what each takes at once."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """On what and how a training runs, which does not change what is trained, to rounding.

    Args:
        devices: processes on this machine, one a GPU; None for all GPUs, or one process on a CPU.
        nodes: machines, each started with the same command by torchrun or SLURM.
        device_batch: images that a device takes at once; None for as many as a step needs. With fewer, a step is
            accumulated.
        save_steps: steps after which the state is written within an epoch; None for after each epoch alone.
        grad_checkpointing: recompute the activations of each block in the backward pass, which saves memory and costs
            a forward pass.
        shard: every process keeps a share of weights, gradients and optimiser state alone (FSDP2), for networks that
            are too large for a device; without an average of the weights.
        compile: run the network through torch.compile.
        log_steps: steps between two lines of steps.csv, and on stderr where there is no bar.

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

    @property
    def processes(self) -> int:
        return self.nodes * (self.devices or torch.cuda.device_count() or 1)

    def at_once(self, batch_size: int) -> int:
        """Images that a process takes at once."""
        return self.device_batch or max(1, batch_size // self.processes)

    def accumulated(self, batch_size: int) -> int:
        """Batches of a process that make a step.

        Raises:
            ValueError: the images of a step cannot be divided so.
        """
        at_once = self.processes * self.at_once(batch_size)
        if batch_size % at_once:
            at_a_time = "" if self.device_batch is None else f" with {self.device_batch} images at once"
            raise ValueError(
                f"batch_size {batch_size} cannot be divided among {self.processes} processes{at_a_time}: it must be a "
                f"multiple of {at_once if self.device_batch else self.processes}"
            )
        return batch_size // at_once
