"""A recipe becomes a Lightning Trainer, and the Trainer a folder with the result."""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy

from replknet.analysis import plots
from replknet.data.download import quiet
from replknet.data.images import ImageError
from replknet.kernels.malloc import keep_freed_memory
from replknet.kernels.onednn import computes_bfloat16
from replknet.shown import shown
from replknet.train.callbacks import GiveBackMemory, ScoreLast, SeedSteps
from replknet.train.checkpoint import KeepState
from replknet.train.curve import KeepCurve
from replknet.train.files import told, write_text
from replknet.train.guard import GuardLoss
from replknet.train.hardware import Hardware
from replknet.train.interrupts import StopOnInterrupt, interrupts_wait_for
from replknet.train.job import Job, Train, check_model
from replknet.train.loaders import Batches
from replknet.train.optimisers import check_optimizer
from replknet.train.progress import Bar, Progress, read_rows
from replknet.train.recipe import Recipe
from replknet.train.state import State, check_fits, read_state

# processes that any machine may run, for a try
_FEW = 4
# of the fields that differ from a state's, how many an error names; parts and letters of such a field
_TOLD, _SHORT, _LETTERS = 5, 8, 60


class ResumeError(ValueError):
    """A training that cannot go on from where it is asked to; the text says why and what to do."""


def run(
    recipe: Recipe,
    train: Train,
    folder: Path,
    data: Path | None = None,
    resume: bool = False,
    hardware: Hardware | None = None,
) -> Path:
    """Train a network of a job; `replknet.tasks.training` is for callers, and says what the arguments are.

    Args:
        recipe: what to train.
        train: of the recipe's task.
        folder: where the result goes.
        data: folder or archive of the images.
        resume: go on from `folder/last.ckpt`.
        hardware: devices and the like.
    """
    check_model(recipe.model)
    check_optimizer(recipe.optimizer)
    if recipe.finetune and recipe.weights is None:
        raise ValueError("this recipe fine-tunes a network: name the checkpoint it starts from with --weights FILE")
    hardware = hardware or Hardware()
    if hardware.shard:
        _check_shardable(hardware)
    if recipe.sync_bn and not torch.cuda.is_available():
        raise ValueError(
            "sync_bn needs GPUs: torch has no SyncBatchNorm on a CPU; without it each process takes the statistics of "
            "its own images"
        )
    _warn_of_emulation(recipe)
    _check_devices(hardware)
    accumulate = hardware.accumulated(recipe.batch_size)
    last = folder / "last.ckpt"
    state = _state(last, recipe, resume)
    keep_freed_memory()
    pl.seed_everything(recipe.seed, verbose=False)
    job = train.job(recipe, data, hardware)
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        read_rows(folder)
    write_text(folder / "recipe.json", json.dumps(recipe.plain, indent=1) + "\n")
    curve = KeepCurve(folder)
    keep = KeepState(folder, job.kept, recipe.plain, curve, hardware.save_steps, job.score)
    stop = StopOnInterrupt(keep.keep)
    # a loss that is no number is neither in the curve nor in a state, and a state never comes before its row
    keepers = (GuardLoss(folder), curve, stop, keep)
    with warnings.catch_warnings(), interrupts_wait_for(stop), _one_line_for_images():
        _ignore_lightnings_advice()
        trainer = _trainer(recipe, job, folder, keepers, hardware, accumulate)
        if state is not None:
            check_fits(state, trainer, job.module)
        trainer.fit(
            job.module,
            datamodule=Batches(job.sets, recipe, accumulate, 0 if state is None else state.steps),
            ckpt_path=str(last) if resume else None,
            weights_only=True,
        )
    if stop.interrupted:
        # it came after the last step
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        plots.save(plots.curves({recipe.model: curve.rows}, job.score), folder / "curve.png")
    return folder / "model.safetensors"


def _warn_of_emulation(recipe: Recipe) -> None:
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


def _state(last: Path, recipe: Recipe, resume: bool) -> State | None:
    """The state that the training goes on from; None for a new training."""
    if not resume:
        if last.exists():
            raise ResumeError(
                f"{last} has the state of an earlier training: --resume goes on with it, "
                "another --output starts a new one"
            )
        return None
    if not last.exists():
        raise ResumeError(f"nothing to resume: there is no {last}")
    state = read_state(last)
    # a state of an earlier version lacks options that came later
    before, now = {**recipe.defaults, **state.recipe}, recipe.plain
    differing = sorted(key for key in now if before.get(key) != now[key])
    if differing:
        changes = ", ".join(f"{key} was {_value(before.get(key))}, now {_value(now[key])}" for key in differing[:_TOLD])
        more = f" and {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
        raise ResumeError(f"{last} is of another recipe ({changes}{more}); give the same options, or another --output")
    return state


def _value(value: object) -> str:
    """A field of a recipe in an error: whole if it is short."""
    text = shown(repr(value)) if isinstance(value, list | dict) and len(value) <= _SHORT else told(value)
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."


def _trainer(
    recipe: Recipe,
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


def _check_devices(hardware: Hardware) -> None:
    """Raise a ValueError if this machine has fewer devices than processes are asked for."""
    gpus, processors = torch.cuda.device_count(), os.cpu_count() or 1
    most, what = (gpus, "GPUs") if gpus else (max(_FEW, processors), "processors")
    if hardware.devices is not None and hardware.devices > most:
        raise ValueError(
            f"devices must be at most {most}, got {hardware.devices}: this machine has {gpus or processors} {what}"
        )


def _check_shardable(hardware: Hardware) -> None:
    if hardware.processes == 1:
        raise ValueError("shard divides the weights among processes, and there is one: give --devices or --nodes")
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
