"""Training of any task."""

from pathlib import Path

from replknet.tasks import TASKS
from replknet.train.fit import run
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe


def fit(
    recipe: Recipe,
    folder: Path,
    data: Path | None = None,
    resume: bool = False,
    hardware: Hardware | None = None,
) -> Path:
    """Train a network. Ctrl-C ends the training after the current step and keeps its state; `resume` continues it.

    A second Ctrl-C stops at once and keeps the last written state. A resumed training computes what an uninterrupted
    one does: images, mixing and drop path are functions of seed, epoch, image and step. On one machine, with equal
    numbers of threads and processes, the weights are equal to the bit.

    Args:
        recipe: what to train; the recipe's task makes the network and the data.
        folder: folder of the result: `model.safetensors` (weights with their description), `best.safetensors` (weights
            of the epoch with the best score), `last.ckpt` (the state for `resume`), `recipe.json`, `metrics.json` (one
            row an epoch), `steps.csv` and `tensorboard/` (loss, learning rate and speed every few steps), `curve.png`.
        data: folder or archive of the images. For CIFAR-10 the folder that keeps it; the cache by default.
        resume: go on from `folder/last.ckpt`.
        hardware: devices and the like; by default all GPUs, or one process on a CPU.

    Returns:
        The path of the weights.

    Raises:
        ResumeError: without `resume`, the folder already has a state. With `resume`, it has none, or one of another
            recipe.
        StateError: the state to go on from is damaged, or a state cannot be written.
        LossError: the loss is NaN or infinite.
        ValueError: the images of a step cannot be divided among the devices, or the checkpoint to start from is not
            named or does not fit.
        ImageError, DownloadError: the data cannot be read or downloaded.
        KeyboardInterrupt: the training was interrupted.
    """
    return run(recipe, TASKS[recipe.task].train, folder, data, resume, hardware)
