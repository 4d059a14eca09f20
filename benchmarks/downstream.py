"""Segmentation and detection on a CPU: the operator against torch's convolution, in turns.

python benchmarks/downstream.py upernet --size 512 512 --runs 5 --output benchmarks/results/downstream.jsonl
python benchmarks/downstream.py fcos --size 800 1333 --runs 5 --output benchmarks/results/downstream.jsonl

Times are of the merged network, one image, float32, channels_last: UperNet with the 150 classes of ADE20K and without
its auxiliary head, or FCOS with the 80 of COCO. Weights are random. The peak of memory is of a process of its own for
each backend, which builds the network and runs it once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import timm
import torch

import replknet
from replknet.kernels import use_backend
from replknet.tasks.detection.batches import batched
from replknet.tasks.detection.fcos import FCOS
from replknet.tasks.segmentation.heads import UperNet, without_auxiliary

WAYS = ("operator", "aten")


def network(kind: str, name: str) -> torch.nn.Module:
    backbone = timm.create_model(name, features_only=True)
    if kind == "upernet":
        model = without_auxiliary(replknet.merge(UperNet(backbone, 150)))
    else:
        model = replknet.merge(FCOS(backbone, 80))
    return model.eval().to(memory_format=torch.channels_last)


def called(model: torch.nn.Module, x: torch.Tensor) -> object:
    return model(x) if isinstance(model, UperNet) else model([x[0]])


def compared(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What both ways must agree on: logits, or the levels that boxes are chosen from."""
    with torch.inference_mode():
        if isinstance(model, UperNet):
            return model(x)
        return torch.cat([level.flatten() for level in model.pyramid(batched([x[0]])[0])])


def run(way: str, model: torch.nn.Module, x: torch.Tensor, what=called) -> object:
    with torch.inference_mode():
        if way == "aten":
            with use_backend("aten"):
                return what(model, x)
        return what(model, x)


def image(size: list[int]) -> torch.Tensor:
    return torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", choices=("upernet", "fcos"))
    p.add_argument("--model", default="replknet_31b")
    p.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("HEIGHT", "WIDTH"))
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--output", type=Path, help="a line of JSON is appended")
    p.add_argument("--peak", choices=WAYS, help="only this process's peak of memory, in bytes")
    args = p.parse_args()
    torch.manual_seed(0)
    model, x = network(args.network, args.model), image(args.size)
    if args.peak:
        run(args.peak, model, x)
        # of this program alone; getrusage would give the peak of the one that started it
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))
        return
    outputs = {way: run(way, model, x, compared) for way in WAYS}
    difference = ((outputs["operator"] - outputs["aten"]).norm() / outputs["aten"].norm()).item()
    assert difference < 1e-4, f"the outputs differ by {difference:.1e}"
    del outputs
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(args.runs):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            start = time.perf_counter()
            run(way, model, x)
            seconds[way].append(time.perf_counter() - start)
    again = [
        sys.executable,
        __file__,
        args.network,
        "--model",
        args.model,
        "--size",
        *map(str, args.size),
    ]
    peaks = {way: int(subprocess.check_output([*again, "--peak", way])) for way in WAYS}
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    record = {
        "date": date.today().isoformat(),
        "network": args.network,
        "model": args.model,
        "size": args.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "seconds": seconds,
        "median": medians,
        "aten_to_operator": medians["aten"] / medians["operator"],
        "peak_bytes": peaks,
        "relative_difference": difference,
    }
    text = json.dumps(record)
    print(text)
    if args.output:
        with args.output.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
