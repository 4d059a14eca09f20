"""A CUDA device that is made up, with its clock, for the tests of the default on GPUs."""

import sys

import torch

import replknet.nn  # noqa: F401
from replknet.kernels import aten, reference, triton_choice
from replknet.kernels.triton_device import Device
from replknet.kernels.triton_plan import DirectTile, PatchTile
from replknet.kernels.triton_tune import Table

PATCH, SUMS = PatchTile(), DirectTile()
TORCH = "torch"


class Made(Device):
    """A device on which each way takes a given time; a way may raise, or give wrong numbers."""

    def __init__(self, path, times, raises=None, wrong=()):
        super().__init__(-1)
        self.table = Table(path)
        self.times = times
        self.raises = raises or {}
        self.wrong = wrong
        self.timed = []
        self.ran = []
        self.built = []
        self.timing = True
        self.graph = False
        self.dead = None
        self.timer = self

    def may_time(self):
        return self.timing

    def recording(self):
        return self.graph

    def settle(self):
        if self.dead is not None:
            raise self.dead

    def once(self, call):
        call()
        self.timed.append((self.ran[-1], "once"))
        return self.times[self.ran[-1]]

    def median(self, call):
        from triton.runtime.errors import OutOfResources

        try:
            call()
        except OutOfResources:
            return None
        self.timed.append((self.ran[-1], "median"))
        return self.times[self.ran[-1]]

    def run_of(self, tile, work):
        def run(x, weight, bias):
            self._start(tile)
            y = reference.forward(x, weight.flip(2, 3) if work.rotated else weight, bias, work.relu)
            return y + 1 if tile in self.wrong else y

        return run

    def gradient_of(self, tile, work):
        def run(dy, x):
            self._start(tile)
            weight = torch.empty(x.shape[1], 1, *work.kernel, dtype=x.dtype)
            return reference.backward(dy, x, weight, [False, True, False])[1]

        return run

    def _start(self, tile):
        self.ran.append(tile)
        if tile in self.raises:
            raise self.raises[tile]


def made_device(monkeypatch, path, times, tiles=(PATCH, SUMS), **how):
    """A device on which ways take `times`; what the choice asks of a device goes there.

    Args:
        monkeypatch: of the test.
        path: of its table.
        times: ms of each tile, and of TORCH.
        tiles: that may be tried.
        how: `raises`, the errors of tiles; `wrong`, the tiles that give wrong numbers.
    """
    device = Made(path, times, **how)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    # the function `replknet.nn.warm` hides the module of that name
    for module in (triton_choice, sys.modules["replknet.nn.warm"]):
        monkeypatch.setattr(module, "device_at", lambda index: device)
    for name in ("run_of", "gradient_of"):
        monkeypatch.setattr(f"replknet.kernels.triton_choice.{name}", getattr(device, name))
        monkeypatch.setattr(f"replknet.kernels.triton_check.{name}", getattr(device, name))
    for name in ("forward_tiles", "gradient_tiles"):
        monkeypatch.setattr(triton_choice, name, lambda *_: tiles)
    monkeypatch.setattr(triton_choice.Question, "compile", lambda self, tile: device.built.append(tile))
    for name in ("forward", "backward", "weight_gradient"):
        monkeypatch.setattr(aten, name, _noted(device, getattr(aten, name)))
    return device


def _noted(device, run):
    def noting(*arguments):
        device.ran.append(TORCH)
        return run(*arguments)

    return noting
