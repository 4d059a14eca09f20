"""A training in two processes, with batch norms that have no statistics, so that one process trains the same."""

import os
import socket
import subprocess
import sys

_PROGRAM = """
import sys
from pathlib import Path
from processes import without_statistics
from replknet.tasks.detection.recipes import DetectionOptions
from replknet.tasks.training import fit
from replknet.tasks.segmentation.recipes import SegmentationOptions
from replknet.train.hardware import Hardware
from replknet.train.recipe import Recipe
from replknet.tasks.segmentation import heads
from replknet.tasks.training import fit
import torch

recipe, folder, data, shard = sys.argv[1:]
torch.nn.BatchNorm2d.forward = without_statistics
heads._DROPOUT = 0.0
fit(eval(recipe), Path(folder), Path(data), hardware=Hardware(devices=2, shard=shard == "True"))
"""


def without_statistics(norm, x):
    """What a batch norm does beside normalising, since each process would see images of its own."""
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def train_in_two(recipe, folder, data, shard=False):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    here = os.path.dirname(__file__)
    # a source tree that is not the installed one may be named there
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CI": "true", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    folder.parent.mkdir(parents=True, exist_ok=True)
    program = folder.parent / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, program, repr(recipe), folder, data, str(shard)]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
