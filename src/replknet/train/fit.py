"""A recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy

from replknet.analysis import plots
from replknet.data.download import quiet
from replknet.data.images import ImageError
from replknet.kernels.malloc import keep_freed_memory
from replknet.kernels.onednn import computes_bfloat16
from replknet.tasks.classification import train as classification
from replknet.tasks.recipes import AnyRecipe, DetectionRecipe, Hardware, Recipe
from replknet.train.callbacks import GiveBackMemory, ScoreLast, SeedSteps
from replknet.train.checkpoint import KeepState, check_whole
from replknet.train.curve import KeepCurve
from replknet.train.guard import GuardLoss
from replknet.train.interrupts import StopOnInterrupt, interrupts_wait_for
from replknet.train.job import Job
from replknet.train.loaders import Batches
from replknet.train.progress import Bar, Progress


class ResumeError(ValueError):
    """A training that cannot go on from where it is asked to; the text says why and what to do."""


def fit(
    recipe: AnyRecipe,
    folder: Path,
    data: Path | None = None,
    resume: bool = False,
    hardware: Hardware | None = None,
) -> Path:
    """Train a network; Ctrl-C keeps the state after the step under way, and `resume` goes on from it.

    A second Ctrl-C stops at once, with the last state that was written. However a training ends, it goes on as if it
    had not: images, mixing and drop path are functions of the seed, the epoch, the image and the step. On the same
    machine and as many threads and processes the weights are the same to the bit.

    Args:
        recipe: what to train.
        folder: where the result goes: `model.safetensors` (weights with their description), `last.ckpt`
            (the state to go on from), `recipe.json` and `metrics.json` (a row an epoch), `best.safetensors` (weights
            of the epoch with the best score), `steps.csv` and `tensorboard/` (loss, learning rate and
            speed every few steps), `curve.png`.
        data: the folder of the images; for CIFAR-10 where it is kept, by default in the cache.
        resume: go on from `folder/last.ckpt`.
        machine: devices and the like; by default all GPUs, or one process on a CPU.

    Returns:
        The path of the weights.

    Raises:
        ResumeError: there is a result in the folder already and `resume` is not asked for, or there is
            none to go on from, or it is of another recipe.
        StateError: the state to go on from is damaged, or one cannot be written.
        LossError: the loss is no number.
        ValueError: the images of a step cannot be divided among the devices, or the checkpoint to start from is not
            named or does not fit.
        ImageError, DownloadError: the data cannot be had.
        KeyboardInterrupt: the training was interrupted.
    """
    if recipe.finetune and recipe.weights is None:
        raise ValueError("this recipe fine-tunes a network: name the checkpoint it starts from with --weights FILE")
    hardware = hardware or Hardware()
    if hardware.shard:
        _check_shardable(recipe, hardware)
    if recipe.sync_bn and not torch.cuda.is_available():
        raise ValueError(
            "sync_bn needs GPUs: torch has no SyncBatchNorm on a CPU; without it each process takes the statistics of "
            "its own images"
        )
    _warn_of_emulation(recipe)
    accumulate = hardware.accumulated(recipe.batch_size)
    last = folder / "last.ckpt"
    done = _steps_done(last, recipe, resume)
    keep_freed_memory()
    pl.seed_everything(recipe.seed, verbose=False)
    job = _job(recipe, data, hardware)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    curve = KeepCurve(folder)
    state = KeepState(folder, job.kept, _plain(recipe), curve, hardware.save_steps, job.score)
    stop = StopOnInterrupt(state.keep)
    # a loss that is no number is neither in the curve nor in a state, and a state never comes before its row
    keepers = (GuardLoss(folder), curve, stop, state)
    with warnings.catch_warnings(), interrupts_wait_for(stop), _one_line_for_images():
        _ignore_lightnings_advice()
        trainer = _trainer(recipe, job, folder, keepers, hardware, accumulate)
        trainer.fit(
            job.task,
            datamodule=Batches(job.sets, recipe, accumulate, done),
            ckpt_path=str(last) if resume else None,
            weights_only=True,
        )
    if stop.interrupted:
        # it came after the last step
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        plots.save(plots.curves({recipe.model: curve.rows}, job.score), folder / "curve.png")
    return folder / "model.safetensors"


def _warn_of_emulation(recipe: AnyRecipe) -> None:
    """bfloat16 on a processor without it is right, but slower than float32 by more than a factor of two."""
    # a torch that does not say whether the processor has it gives no reason for a warning
    if torch.cuda.is_available() or computes_bfloat16() is not False:
        return
    found = []
    if recipe.precision == "bf16-mixed":
        found.append("--precision 32-true trains in float32")
    if "muon" in recipe.optimizer:
        found.append("timm's Muon computes in bfloat16 whatever the precision, --optimizer adamw does not")
    if found:
        warnings.warn(
            f"this processor has no bfloat16, and torch's emulation of it is slow: {'; '.join(found)}", stacklevel=3
        )


@contextmanager
def _one_line_for_images() -> Iterator[None]:
    """torch's loaders put the traceback of a worker into the text of its error."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).rstrip().rsplit("ImageError: ", 1)[-1]) from error


def _plain(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def _steps_done(last: Path, recipe: AnyRecipe, resume: bool) -> int:
    """Steps of the training that goes on, 0 for a new one."""
    if not resume:
        if last.exists():
            raise ResumeError(
                f"{last} has the state of an earlier training: --resume goes on with it, "
                "another --output starts a new one"
            )
        return 0
    if not last.exists():
        raise ResumeError(f"nothing to resume: there is no {last}")
    check_whole(last)
    state = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
    # a state of an earlier version lacks options that came later
    defaults = {f.name: f.default for f in fields(recipe) if f.default is not MISSING}
    before, now = {**defaults, **state.get("replknet_recipe", {})}, _plain(recipe)
    differing = sorted(key for key in now if before.get(key) != now[key])
    if differing:
        told = ", ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in differing)
        raise ResumeError(f"{last} is of another recipe ({told}); give the same options, or another --output")
    return int(state["global_step"])


def _job(recipe: AnyRecipe, data: Path | None, hardware: Hardware) -> Job:
    if isinstance(recipe, Recipe):
        return classification.job(recipe, data, hardware)
    # the packages of the others are optional
    if isinstance(recipe, DetectionRecipe):
        from replknet.tasks.detection import train as detection

        return detection.job(recipe, data, hardware)
    from replknet.tasks.segmentation import train as segmentation

    return segmentation.job(recipe, data, hardware)


def _trainer(
    recipe: AnyRecipe,
    job: Job,
    folder: Path,
    keepers: Sequence[pl.Callback],
    hardware: Hardware,
    accumulate: int,
) -> pl.Trainer:
    lines = quiet()
    progress = Progress(folder, recipe.batch_size, hardware.log_steps, lines)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    callbacks: list[pl.Callback] = [
        ScoreLast(),
        *job.callbacks,
        *keepers,
        SeedSteps(recipe.seed),
        GiveBackMemory(),
        progress,
    ]
    return pl.Trainer(
        accelerator="auto",
        devices="auto" if hardware.devices is None else hardware.devices,
        num_nodes=hardware.nodes,
        strategy=_strategy(hardware),
        precision=recipe.precision,
        max_epochs=job.epochs,
        check_val_every_n_epoch=job.score_every,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=recipe.clip_grad,
        logger=False,
        callbacks=callbacks if lines else [*callbacks, Bar(progress)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not lines,
        num_sanity_val_steps=0,
        limit_val_batches=None if recipe.evaluate else 0,
        use_distributed_sampler=False,
        # weights that are gathered in it could not be trained on
        inference_mode=not hardware.shard,
    )


def _check_shardable(recipe: AnyRecipe, hardware: Hardware) -> None:
    if hardware.processes == 1:
        raise ValueError("shard divides the weights among processes, and there is one: give --devices or --nodes")
    if isinstance(recipe, DetectionRecipe):
        raise ValueError("shard was never tried with a detector; leave it out")
    if isinstance(recipe, Recipe) and recipe.ema_decay is not None:
        raise ValueError(
            "shard takes no average of the weights (ema_decay): timm's average copies whole weights, and no process "
            "has them; --ema-decay null trains without, or leave out --shard"
        )
    if hardware.compile:
        raise ValueError("shard with compile was never tried; leave out one of them")


def _strategy(hardware: Hardware) -> str | Strategy:
    if hardware.shard:
        return ModelParallelStrategy(
            data_parallel_size=hardware.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "auto" if hardware.processes == 1 else "ddp"


def _ignore_lightnings_advice() -> None:
    for text in (
        ".*does not have many workers.*",  # two cores have none to spare
        ".*lr_scheduler.step.*",  # timm's schedulers count steps themselves
        ".*in eval mode at the start of training.*",  # the average of the weights always is
        ".*LeafSpec.*",  # Lightning 2.6 uses what torch 2.14 deprecates
        ".*sync_dist.*",  # what is logged was reduced
        ".*Grad strides do not match bucket view strides.*",  # one input channel: its stride means nothing
        ".*ended before the epoch ended.*",  # the sampler knows where to go on
    ):
        warnings.filterwarnings("ignore", text)
