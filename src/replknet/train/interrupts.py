"""Ctrl-C ends a training between two steps, where nothing is half done."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl


class StopOnInterrupt(pl.Callback):
    """End the training before its next step once it was interrupted, and keep the state first.

    Weights, average, schedule and counters are then those of the step before.

    Args:
        keep: writes the state.

    Attributes:
        interrupted: whether to end. The end of the training may come before the next step does, so the caller looks
            here, too.

    Raises:
        KeyboardInterrupt: in the hook, where the training ends.
    """

    def __init__(self, keep: Callable[[pl.Trainer, pl.LightningModule], None]) -> None:
        self.keep = keep
        self.interrupted = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.interrupted or batch_idx % trainer.accumulate_grad_batches:
            return
        # before the first step there is nothing to keep
        if trainer.global_step > 0:
            self.keep(trainer, module)
        raise KeyboardInterrupt


@contextmanager
def interrupts_wait_for(stop: StopOnInterrupt) -> Iterator[None]:
    """Have the first Ctrl-C end the training at its next step, and the second at once.

    Lightning can go on from a state inside a step or inside validation, but then trains a step twice or forgets what
    the epoch had logged. Outside of the main thread, and where Ctrl-C is ignored, nothing changes.

    Args:
        stop: ends the training.

    Raises:
        KeyboardInterrupt: the training was interrupted.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return

    def first(number: int, frame: object) -> None:
        stop.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # print() could be interrupted by itself
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once and keeps the last epoch's state\n")

    signal.signal(signal.SIGINT, first)
    try:
        yield
    except SystemExit:
        # Lightning turns a KeyboardInterrupt into an exit
        raise KeyboardInterrupt from None
    finally:
        # Lightning ignores the signal from then on
        signal.signal(signal.SIGINT, before)
