"""RepLKNet-31B and the networks that the paper compares it with: costs, times and peak memory.

Weights are random; the input is one image in float32, in inference mode. RepLKNet is merged, with batch norms folded.
The others are as timm builds them, with the batch norms of the ResNets unfolded. Every network is timed in both memory
formats, and the faster one counts.

Peak memory is measured in a separate process, which loads the network and runs it once:
`python -m replknet.bench.rivals FILE SIZE LAYOUT BACKEND DEVICE THREADS`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from replknet.analysis.cost import cost
from replknet.bench.records import ProcessError
from replknet.deploy.verify import AccuracyError
from replknet.kernels import use_backend
from replknet.nn import accelerate, merge
from replknet.timing import Load, Timing, interleaved

Layout = Literal["nhwc", "nchw"]
Bar = tuple[float, float, float, float | None, float | None]
_FORMATS: dict[Layout, torch.memory_format] = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
# a relative L2 difference between a network's outputs in two ways up to this counts as rounding
_BOUND = 1e-4


@dataclass(frozen=True, slots=True)
class Mode:
    """What the networks do: one image `[1,3,size,size]` to 1000 logits or, if dense, to four levels of features."""

    name: str
    size: int
    dense: bool = False


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (Mode("classifier 224", 224), Mode("classifier 384", 384), Mode("backbone 512", 512, dense=True))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One network of the comparison.

    Args:
        name: name for people.
        model: timm's name.
        at_384: timm's name of the version for 384 pixels, if that is another model.
        sized: whether timm must be told the size of the images.
        convolution: convolution of the depthwise layers. "torch" leaves the network as timm builds it. "operator"
            merges and accelerates it. "aten" does so, too, and forces torch's own convolution.
    """

    name: str
    model: str
    at_384: str | None = None
    sized: bool = False
    convolution: Literal["torch", "operator", "aten"] = "torch"


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival(name="RepLKNet-31B", model="replknet_31b", convolution="operator"),
        Rival(name="RepLKNet-31B on torch's convolution", model="replknet_31b", convolution="aten"),
        Rival(name="Swin-B", model="swin_base_patch4_window7_224", at_384="swin_base_patch4_window12_384", sized=True),
        Rival(name="ConvNeXt-B", model="convnext_base"),
        Rival(name="ConvNeXt-B on the operator", model="convnext_base", convolution="operator"),
        Rival(name="ResNet-101", model="resnet101"),
        Rival(name="ResNeXt-101 64x4d", model="resnext101_64x4d"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published results of a network pretrained on ImageNet-1K alone; None if we know no source.

    Args:
        top1_224: top-1 on ImageNet, %, at 224 pixels.
        top1_384: top-1 on ImageNet, %, at 384 pixels.
        gmacs_224: multiply-adds in units of 10**9, at 224 pixels; the papers print them as FLOPs.
        gmacs_384: multiply-adds in units of 10**9, at 384 pixels.
        ade20k: mIoU of UperNet, %, single-scale and multi-scale.
        cityscapes: mIoU of UperNet, %, single-scale and multi-scale.
        coco: AP of boxes and masks, Cascade Mask R-CNN, 3x schedule.

    Source: Ding et al. 2022, arXiv:2203.06717, Table 6 and the official README: RepLKNet everywhere, Swin on ImageNet
    and Cityscapes. The journal version, arXiv:2410.08049, Table 7: ADE20K. Chen et al. 2024, arXiv:2403.07589: Swin
    and ConvNeXt on COCO.
    """

    top1_224: float | None = None
    top1_384: float | None = None
    gmacs_224: float | None = None
    gmacs_384: float | None = None
    ade20k: tuple[float, float] | None = None
    cityscapes: tuple[float, float] | None = None
    coco: tuple[float, float] | None = None


PUBLISHED: dict[str, Published] = {
    "RepLKNet-31B": Published(
        top1_224=83.5,
        top1_384=84.8,
        gmacs_224=15.3,
        gmacs_384=45.1,
        ade20k=(49.9, 50.6),
        cityscapes=(83.1, 83.5),
        coco=(52.2, 45.2),
    ),
    "Swin-B": Published(
        top1_224=83.5,
        top1_384=84.5,
        gmacs_224=15.4,
        gmacs_384=47.0,
        ade20k=(48.1, 49.7),
        cityscapes=(80.4, 81.5),
        coco=(51.9, 45.0),
    ),
    "ConvNeXt-B": Published(ade20k=(49.1, 49.9), coco=(52.7, 45.6)),
    "ResNet-101": Published(),
    "ResNeXt-101 64x4d": Published(),
}


@dataclass(frozen=True)
class Memory:
    """Memory of a separate process; on a CUDA device, what torch allocated there, without the libraries."""

    program_bytes: int  # held before the network is loaded: Python, torch and timm, the same for all
    loaded_bytes: int  # held before the first run: with the weights
    loaded_peak_bytes: int  # the peak until then
    peak_bytes: int  # the peak after one run


@dataclass(frozen=True)
class RivalRecord:
    """What one network costs in one mode; `asdict` gives JSON."""

    name: str
    mode: str
    model: str  # timm's name
    size: int  # side of the image, pixels
    convolution: str
    parameters: int
    multiply_adds: int  # of one image, padding included
    timings: Mapping[Layout, Timing]
    layout: Layout  # the faster
    memory: Memory | None  # in that layout; None if neither Linux nor CUDA reports it
    device: str
    threads: int
    load: Mapping[str, float | None]

    @property
    def timing(self) -> Timing:
        """The time in the faster memory format."""
        return self.timings[self.layout]


def measure(
    mode: Mode,
    names: Sequence[str] | None = None,
    runs: int = 10,
    limit_s: float = 60.0,
    device: str = "cpu",
) -> list[RivalRecord]:
    """Count the networks, time them in turns in one process, and run each once in its own process.

    Args:
        mode: one of `MODES`.
        names: names in `RIVALS`; None for all. Two copies of each network are held at once, 5 GB for all.
        runs: rounds, at least 2.
        limit_s: a network in one layout that has taken this many seconds sits out after three rounds.
        device: "cpu" or "cuda". On CUDA, torch's convolutions may use TF32, and results then differ by more than
            rounding: set `torch.backends.cudnn.conv.fp32_precision = "ieee"` before.

    Returns:
        One record a network, in the order of the names.

    Raises:
        ValueError: there is no network of that name.
        AccuracyError: a network's outputs are not finite, or differ between two ways by more than rounding.
    """
    names = list(RIVALS) if names is None else names
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"no network is called {name!r}; there are {', '.join(RIVALS)}")
    rivals = [RIVALS[name] for name in names]
    networks: dict[tuple[str, bool], dict[Layout, nn.Module]] = {}
    for rival in rivals:
        if _key(rival) not in networks:
            networks[_key(rival)] = _in_both_layouts(network(rival, mode).to(device))
    x = torch.randn(1, 3, mode.size, mode.size, generator=torch.Generator().manual_seed(0)).to(device)
    images = {layout: x.contiguous(memory_format=form) for layout, form in _FORMATS.items()}
    _compare(rivals, networks, images)
    load = Load()
    times = interleaved(
        {
            _way(rival, layout): partial(_run, networks[_key(rival)][layout], _backend(rival), images[layout])
            for rival in rivals
            for layout in _FORMATS
        },
        runs,
        limit_s,
    )
    disturbed = load.end()
    records = []
    for rival in rivals:
        timings = {layout: times[_way(rival, layout)] for layout in _FORMATS}
        layout = min(timings, key=lambda layout: timings[layout].p50_ms)
        model = networks[_key(rival)][layout]
        counted = cost(model, mode.size)
        records.append(
            RivalRecord(
                name=rival.name,
                mode=mode.name,
                model=_model(rival, mode),
                size=mode.size,
                convolution=rival.convolution,
                parameters=counted.parameters,
                multiply_adds=counted.multiply_adds,
                timings=timings,
                layout=layout,
                memory=peak(model, mode.size, layout, _backend(rival), device),
                device=device,
                threads=torch.get_num_threads(),
                load=disturbed,
            )
        )
    return records


def network(rival: Rival, mode: Mode) -> nn.Module:
    """A network with random weights, ready for inference.

    Args:
        rival: the network to build.
        mode: size of its images and kind of its outputs.

    Returns:
        The network in eval mode. It gives logits `[1,1000]`, or four levels, at 1/4, 1/8, 1/16 and 1/32 of the image.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 1000}
    if mode.dense:
        # the last four levels: a ResNet has one more before them
        options = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    if rival.sized:
        options["img_size"] = mode.size
    model = timm.create_model(_model(rival, mode), **options).eval()
    if rival.convolution == "torch":
        return model
    # both leave layers that they do not know unchanged
    model = merge(model)
    accelerate(model)
    return model


def peak(model: nn.Module, size: int, layout: Layout, backend: str | None, device: str = "cpu") -> Memory | None:
    """Memory of a process that loads a network and runs it once on one image.

    Args:
        model: the network; the process reads it from a file.
        size: side of the image, pixels.
        layout: memory format of the image and the weights.
        backend: the backend to force, or None.
        device: "cpu" or "cuda".

    Returns:
        What the process held and its peaks; None on a CPU without Linux, where the system does not report them.

    Raises:
        ProcessError: the process failed; the text has its last line on stderr.
    """
    if device == "cpu" and platform.system() != "Linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.pt"
        torch.save(model, file)
        arguments = (file, size, layout, backend or "", device, torch.get_num_threads())
        command = [sys.executable, "-m", "replknet.bench.rivals", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ProcessError(f"the process that measures memory ended with {result.returncode}, not 0: {last[0]}")
    return Memory(**json.loads(result.stdout))


def _run_once(file: str, size: str, layout: Layout, backend: str, device: str, threads: str) -> dict[str, int]:
    """The fields of `Memory`, in a process that has done nothing else."""
    torch.set_num_threads(int(threads))
    program = _held(device)[0]
    # safe: this package wrote the file a moment ago
    model = torch.load(file, map_location=device, weights_only=False)
    x = torch.randn(1, 3, int(size), int(size), device=device).contiguous(memory_format=_FORMATS[layout])
    loaded, loaded_peak = _held(device)
    _run(model, backend or None, x)
    return {
        "program_bytes": program,
        "loaded_bytes": loaded,
        "loaded_peak_bytes": loaded_peak,
        "peak_bytes": _held(device)[1],
    }


def _held(device: str) -> tuple[int, int]:
    """Bytes held by this process or on the device, and their peak."""
    if device != "cpu":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    # this program alone; getrusage would give the peak of the program that started it
    status = Path("/proc/self/status").read_text()
    rss, hwm = (1024 * int(status.split(f"{field}:")[1].split()[0]) for field in ("VmRSS", "VmHWM"))
    return rss, hwm


def _model(rival: Rival, mode: Mode) -> str:
    return rival.at_384 if mode.size == 384 and rival.at_384 is not None else rival.model


def _key(rival: Rival) -> tuple[str, bool]:
    """The key of the network in memory; a forced backend needs no other network."""
    return rival.model, rival.convolution != "torch"


def _way(rival: Rival, layout: Layout) -> str:
    return f"{rival.name} {layout}"


def _backend(rival: Rival) -> str | None:
    return "aten" if rival.convolution == "aten" else None


def _in_both_layouts(model: nn.Module) -> dict[Layout, nn.Module]:
    return {"nhwc": deepcopy(model).to(memory_format=torch.channels_last), "nchw": model}


def _run(model: nn.Module, backend: str | None, x: Tensor) -> list[Tensor]:
    with use_backend(backend), torch.inference_mode():
        y = model(x)
    return [y] if isinstance(y, Tensor) else list(y)


def _compare(
    rivals: Sequence[Rival],
    networks: Mapping[tuple[str, bool], Mapping[Layout, nn.Module]],
    images: Mapping[Layout, Tensor],
) -> None:
    """Raise an error unless all ways of a network give the same finite outputs."""
    first: dict[str, list[Tensor]] = {}
    for rival in rivals:
        for layout, model in networks[_key(rival)].items():
            found = _run(model, _backend(rival), images[layout])
            expected = first.setdefault(rival.model, found)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
            # a NaN fails, too
            if not error <= _BOUND or not all(level.isfinite().all() for level in found):
                raise AccuracyError(
                    f"{rival.name} in {layout} must give the outputs of {rival.model}'s first way within {_BOUND:g}, "
                    f"got a difference of {error:.1e}; it is not timed"
                )


if __name__ == "__main__":
    print(json.dumps(_run_once(*sys.argv[1:])))  # type: ignore[arg-type]  # what `peak` wrote
