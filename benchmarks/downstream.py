"""Segmentation on a CPU: RepLKNet-31B with UperNet, the operator against torch's convolution, in turns.

python benchmarks/segmentation.py --size 512 512 --runs 5 --output benchmarks/results/segmentation.jsonl

Times are of the merged network without its auxiliary head, one image, float32, channels_last. The peak of memory is of
a process of its own for each backend, which builds the network and runs it once.
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
from replknet.tasks.upernet import UperNet, without_auxiliary

WAYS = ("operator", "aten")


def network(name: str, classes: int) -> UperNet:
    model = UperNet(timm.create_model(name, features_only=True), classes)
    return without_auxiliary(replknet.merge(model)).eval().to(memory_format=torch.channels_last)


def run(way: str, model: UperNet, x: torch.Tensor) -> torch.Tensor:
    if way == "aten":
        with use_backend("aten"), torch.inference_mode():
            return model(x)
    with torch.inference_mode():
        return model(x)


def image(size: list[int]) -> torch.Tensor:
    return torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="replknet_31b")
    p.add_argument("--classes", type=int, default=150)
    p.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("HEIGHT", "WIDTH"))
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--output", type=Path, help="a line of JSON is appended")
    p.add_argument("--peak", choices=WAYS, help="only this process's peak of memory, in bytes")
    args = p.parse_args()
    torch.manual_seed(0)
    model, x = network(args.model, args.classes), image(args.size)
    if args.peak:
        run(args.peak, model, x)
        # of this program alone; getrusage would give the peak of the one that started it
        status = Path("/proc/self/status").read_text()
        print(1024 * int(status.split("VmHWM:")[1].split()[0]))
        return
    logits = {way: run(way, model, x) for way in WAYS}
    difference = ((logits["operator"] - logits["aten"]).norm() / logits["aten"].norm()).item()
    assert difference < 1e-4, f"the logits differ by {difference:.1e}"
    del logits
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(args.runs):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            start = time.perf_counter()
            run(way, model, x)
            seconds[way].append(time.perf_counter() - start)
    again = [
        sys.executable,
        __file__,
        "--model",
        args.model,
        "--classes",
        str(args.classes),
        "--size",
        *map(str, args.size),
    ]
    peaks = {way: int(subprocess.check_output([*again, "--peak", way])) for way in WAYS}
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    record = {
        "date": date.today().isoformat(),
        "model": args.model,
        "size": args.size,
        "classes": args.classes,
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
