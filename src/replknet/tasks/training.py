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
    """Train a network; Ctrl-C keeps the state after the step under way, and `resume` goes on from it.

    A second Ctrl-C stops at once, with the last state that was written. However a training ends, it goes on as if it
    had not: images, mixing and drop path are functions of the seed, the epoch, the image and the step. On the same
    machine, with as many threads and processes, the weights are the same to the bit.

    Args:
        recipe: what to train; the recipe's task makes network and data.
        folder: where the result goes: `model.safetensors` (weights with their description), `last.ckpt` (the state to
            go on from), `recipe.json` and `metrics.json` (a row an epoch), `best.safetensors` (weights of the epoch
            with the best score), `steps.csv` and `tensorboard/` (loss, learning rate and speed every few steps),
            `curve.png`.
        data: the folder or archive of the images; for CIFAR-10 where it is kept, by default in the cache.
        resume: go on from `folder/last.ckpt`.
        hardware: devices and the like; by default all GPUs, or one process on a CPU.

    Returns:
        The path of the weights.

    Raises:
        ResumeError: there is a result in the folder already and `resume` is not asked for, or there is none to go on
            from, or it is of another recipe.
        StateError: the state to go on from is damaged, or one cannot be written.
        LossError: the loss is no number.
        ValueError: the images of a step cannot be divided among the devices, or the checkpoint to start from is not
            named or does not fit.
        ImageError, DownloadError: the data cannot be had.
        KeyboardInterrupt: the training was interrupted.
    """
    return run(recipe, TASKS[recipe.task].train, folder, data, resume, hardware)
