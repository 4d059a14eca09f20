"""A training in two processes, with batch norms that have no statistics, so that one process trains the same."""

import dataclasses
import os
import socket
import subprocess
import sys

_PROGRAM = """
import sys
from pathlib import Path
from processes import without_statistics
from replknet.tasks import recipes
from replknet.tasks.segmentation import heads
from replknet.train import fit
import torch

kind, fields, folder, data, shard = sys.argv[1:]
torch.nn.BatchNorm2d.forward = without_statistics
heads._DROPOUT = 0.0
hardware = recipes.Hardware(devices=2, shard=shard == "True")
fit(getattr(recipes, kind)(**eval(fields)), Path(folder), Path(data), hardware=hardware)
"""


def without_statistics(norm, x):
    """What a batch norm does beside normalising, since each process would see images of its own."""
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def train_in_two(recipe, folder, data, shard=False):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    here = os.path.dirname(__file__)
    environment = {**os.environ, "CI": "true", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    folder.parent.mkdir(parents=True, exist_ok=True)
    program = folder.parent / "program.py"
    program.write_text(_PROGRAM)
    fields = repr(dataclasses.asdict(recipe))
    command = [sys.executable, program, type(recipe).__name__, fields, folder, data, str(shard)]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
