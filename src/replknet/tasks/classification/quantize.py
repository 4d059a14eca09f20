"""Classifiers in int8 for other runtimes, with the layers in float32 that cost too much otherwise.

In int8 are the weights of convolutions and linear layers, with a scale for each output channel, and what goes into
these layers, with a scale for a tensor. Sums of branches, GELU, the last norm and the mean stay in float32. Everything
is measured in the runtime that the file is for.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from replknet.analysis.learned_kernels import distances, mean_magnitude
from replknet.deploy.files import ENDINGS as FLOAT_ENDINGS
from replknet.deploy.quantizers import QUANTIZERS, Quantizer, Target, layers, loaded
from replknet.deploy.verify import AccuracyError, kept
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.tasks.classification.export import Card, export_classifier
from replknet.timing import Timing, interleaved

# endings of the files, which are those of exported networks as well
ENDINGS: dict[Target, str] = {"onnx": ".int8.onnx", "openvino": ".int8.xml"}
# share of the layers that may stay in float32: with more of them a file is hardly one in int8
MOST_FLOAT = 0.5
# images on which the sensitivity of layers is measured
_PROBES = 512

Scored = Iterable[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What int8 has to hold of a layer's weights, as `merge` leaves them; sizes are absolute values.

    Args:
        peak: largest weight of an output channel by the root mean square of the channel; the largest of all channels.
        spread: largest weight of the layer by the median over channels of their largest: the factor by which one scale
            for the layer is too coarse for half of the channels.
        centre: of depthwise kernels larger than 3x3, the mean size of the central 3x3 by that of the taps around it,
            each channel in its own unit; None for others.
        outer_steps: of the same kernels, the median size of the taps around the central 3x3 in steps of int8, with a
            scale for each channel.
        zeros: share of the weights that int8 rounds to zero, with a scale for each channel.
        zeros_per_tensor: the same with one scale for the layer.
    """

    peak: float
    spread: float
    centre: float | None
    outer_steps: float | None
    zeros: float
    zeros_per_tensor: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear layer of the merged network.

    Args:
        name: as in `named_modules`.
        shape: of its weight.
        kept: whether it stays in float32.
        sensitivity: relative L2 difference of the logits when this layer alone is in int8; None where all layers
            together fit, and nothing was searched.
        ranges: of its weight.
    """

    name: str
    shape: tuple[int, ...]
    kept: bool
    sensitivity: float | None
    ranges: Ranges


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How a file in int8 was found.

    Args:
        images: on which the search scored.
        before: share of them that the file in float32 has right, from 0 to 1.
        all_int8: that of the file with every layer in int8.
        after: that of the file which was written.
        lost_all_int8: share of the images that are right in float32 and no longer with every layer in int8.
        lost: the same of the file which was written.
        bytes_before: of the file in float32, with its weights.
        bytes_after: of the file which was written.
        trials: how many selections of layers were scored.
        layers: in the order of the network.
    """

    images: int
    before: float
    all_int8: float
    after: float
    lost_all_int8: float
    lost: float
    bytes_before: int
    bytes_after: int
    trials: int
    layers: tuple[Layer, ...]


def quantize_classifier(
    model: StagedNet,
    card: Card,
    path: str | Path,
    to: Target,
    calibration: Sequence[Tensor],
    scored: Scored,
    loss: float = 0.5,
    per_channel: bool = True,
) -> Quantized:
    """Write a classifier in int8 that loses no more accuracy than is allowed, with few layers in float32.

    All layers are tried first. If they cost too much, each layer is measured in int8 alone, and the most sensitive
    ones stay in float32: the fewest that fit, found by bisection. What counts is right answers that are lost, without
    those that are gained, so that chance hides no damage: a network is right on nearly all images of its training.

    Args:
        model: a network of ours in any form, of any dtype and on any device; it stays as it was.
        card: what else the file holds.
        path: ends as `ENDINGS` says. An existing file is replaced only by one that fits.
        to: ONNX with QuantizeLinear and DequantizeLinear, for ONNX Runtime; or OpenVINO, by NNCF.
        calibration: prepared images `[N,3,H,W]`, float32, that give the ranges of what goes into the layers.
        scored: batches of such images and labels `[N]` on which accuracy is measured, other ones than those of a
            test; None is skipped. It is gone through several times.
        loss: right answers that may be lost on them, percentage points; the loss of accuracy is no larger.
        per_channel: False for one scale a weight, to see what it costs.

    Returns:
        What was measured, and the layers with their weights' ranges.

    Raises:
        ValueError: another ending, a negative loss, or no images.
        AccuracyError: it costs more even with `MOST_FLOAT` of the layers in float32; no file is left.
        RuntimeError: the exported network is not torch's.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS[to]):
        raise ValueError(f"a file in int8 for {to} ends in {ENDINGS[to]}, got {path.name}")
    if not loss >= 0:
        raise ValueError(f"the loss that is allowed must be 0 points or more, got {loss}")
    if not sum(map(len, calibration)):
        raise ValueError("ranges are measured on images: expected some for calibration, got none")
    network = merge(model).float().cpu().eval()
    with TemporaryDirectory() as folder, kept(path) as part:
        source = Path(folder) / f"float{FLOAT_ENDINGS[to]}"
        export_classifier(network, card, source, to)
        search = _Search(path.name, Path(folder), QUANTIZERS[to](source, network, calibration, per_channel), scored)
        names = [name for name, _ in layers(network)]
        right = search.right(source)

        def cost(float_layers: Collection[str]) -> float:
            return 100 * _share(right & ~search.tried(float_layers))

        chosen: list[str] = []
        sensitivity: dict[str, float] = {}
        if cost([]) > loss:
            sensitivity = search.sensitivities(source, names)
            order = sorted(names, key=sensitivity.__getitem__, reverse=True)
            most = int(MOST_FLOAT * len(names))
            number = _fewest(lambda n: cost(order[:n]) <= loss, most)
            if number is None:
                raise AccuracyError(
                    f"int8 costs {cost([]):.2f} points of right answers on {len(right)} images, and "
                    f"{cost(order[:most]):.2f} with the {most} most sensitive of {len(names)} layers in float32, where "
                    f"{loss} are allowed; no file was written. More images for calibration may help"
                )
            chosen = order[:number]
        for file in search.folder_of(chosen).iterdir():
            shutil.move(file, part.parent / file.name)
        return Quantized(
            images=len(right),
            before=_share(right),
            all_int8=_share(search.tried([])),
            after=_share(search.tried(chosen)),
            lost_all_int8=cost([]) / 100,
            lost=cost(chosen) / 100,
            bytes_before=size(source),
            bytes_after=size(part),
            trials=search.trials,
            layers=tuple(
                Layer(
                    name=name,
                    shape=tuple(weight.shape),
                    kept=name in chosen,
                    sensitivity=sensitivity.get(name),
                    ranges=ranges(weight),
                )
                for name, weight in layers(network)
            ),
        )


def ranges(weight: Tensor) -> Ranges:
    """What int8 has to hold of the weight `[channels,...]` of a convolution or linear layer."""
    w = weight.detach().double().flatten(1).abs()
    largest, rms = w.amax(1), w.square().mean(1).sqrt()
    alive = rms > 0
    # the largest is 127 steps
    steps = 127 * w / largest[:, None].clamp(min=1e-300)
    centre = outer_steps = None
    if weight.ndim == 4 and weight.shape[1] == 1 and min(weight.shape[2:]) > 3:
        magnitudes = mean_magnitude(weight.detach().double()[:, 0])
        inside = distances(*magnitudes.shape) <= 1
        centre = (magnitudes[inside].mean() / magnitudes[~inside].mean()).item()
        outer_steps = steps[:, ~inside.flatten()].quantile(0.5).item()
    return Ranges(
        peak=(largest[alive] / rms[alive]).max().item() if alive.any() else 0.0,
        spread=(largest.max() / largest[alive].quantile(0.5)).item() if alive.any() else 0.0,
        centre=centre,
        outer_steps=outer_steps,
        zeros=(steps < 0.5).double().mean().item(),
        zeros_per_tensor=(127 * w < 0.5 * largest.max()).double().mean().item(),
    )


def size(path: Path) -> int:
    """Bytes of a file and, for OpenVINO, of its weights beside it."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)


def timed(files: Mapping[str, Path], x: Tensor, threads: int, runs: int = 30) -> dict[str, Timing]:
    """Time files on one batch of images `[N,3,H,W]`, in turns, each in its own runtime with so many threads."""
    runners = {name: loaded(path, threads) for name, path in files.items()}
    return interleaved({name: partial(run, x) for name, run in runners.items()}, runs)


# ---- the search


class _Search:
    """Files with other layers in float32 each, and which images they have right.

    Args:
        name: of every file.
        folder: where they are, each in a folder of its own.
        quantizer: writes one.
        scored: images and labels.
    """

    def __init__(self, name: str, folder: Path, quantizer: Quantizer, scored: Scored) -> None:
        self._name, self._folder, self._quantizer, self._scored = name, folder, quantizer, scored
        self._threads = torch.get_num_threads()
        self._numbers = count()
        self._tried: dict[frozenset[str], tuple[Path, Tensor]] = {}

    @property
    def trials(self) -> int:
        return len(self._tried)

    def right(self, file: Path) -> Tensor:
        """Which images a file has right `[N]`."""
        run = loaded(file, self._threads)
        right = [run(x)[0].argmax(1) == labels for x, labels in filter(None, self._scored)]
        if not right:
            raise ValueError("expected images on which accuracy is measured, got none")
        return torch.cat(right)

    def tried(self, float_layers: Collection[str]) -> Tensor:
        """Which images are right with these layers in float32 `[N]`."""
        key = frozenset(float_layers)
        if key not in self._tried:
            file = self._written(float_layers)
            self._tried[key] = file.parent, self.right(file)
        return self._tried[key][1]

    def folder_of(self, float_layers: Collection[str]) -> Path:
        """Where the file is that was tried with these."""
        return self._tried[frozenset(float_layers)][0]

    def sensitivities(self, source: Path, names: Sequence[str]) -> dict[str, float]:
        """The relative L2 difference of the logits from the file in float32 when one layer alone is in int8."""
        probes: list[Tensor] = []
        for x, _ in filter(None, self._scored):
            probes.append(x)
            if sum(map(len, probes)) >= _PROBES:
                break
        wanted = self._logits(source, probes)
        found = {}
        for name in names:
            file = self._written([other for other in names if other != name])
            found[name] = ((self._logits(file, probes) - wanted).norm() / wanted.norm()).item()
            shutil.rmtree(file.parent)
        return found

    def _logits(self, file: Path, images: list[Tensor]) -> Tensor:
        run = loaded(file, self._threads)
        return torch.cat([run(x)[0] for x in images])

    def _written(self, float_layers: Collection[str]) -> Path:
        file = self._folder / str(next(self._numbers)) / self._name
        file.parent.mkdir()
        self._quantizer(float_layers, file)
        return file


def _share(of: Tensor) -> float:
    return of.double().mean().item()


def _fewest(fits: Callable[[int], bool], most: int) -> int | None:
    """The smallest number that fits, by bisection, where 0 does not; None where `most` does not either."""
    if most == 0 or not fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
