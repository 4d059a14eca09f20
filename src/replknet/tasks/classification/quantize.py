"""Classifiers in int8 for other runtimes. Layers whose int8 costs too much accuracy stay in float32.

Convolutions and linear layers compute in int8: their weights have a scale for each output channel, their inputs one
scale. Sums of branches, GELU, the last norm and the mean stay in float32. All measurements run in the runtime of the
file.
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

# endings of the files; exported networks in float32 have the endings .onnx and .xml, too
ENDINGS: dict[Target, str] = {"onnx": ".int8.onnx", "openvino": ".int8.xml"}
# largest share of the layers that may stay in float32
MOST_FLOAT = 0.5
# number of images that measure the sensitivity of layers, rounded up to whole batches
_PROBES = 512

Scored = Iterable[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Ranges of a layer's weights, which make int8 hard. The weights are those of the merged network, as magnitudes.

    Args:
        peak: largest weight of an output channel divided by the root mean square of the channel; maximum over channels.
        spread: largest weight of the layer divided by the median over channels of their largest weight. With one scale
            for the layer, the steps are too coarse for half of the channels by this factor.
        centre: mean of the central 3x3 taps divided by the mean of all other taps, with each channel in its own unit;
            None except for depthwise kernels larger than 3x3.
        outer_steps: median of the taps outside the central 3x3, in steps of int8 with a scale for each channel; None
            except for depthwise kernels larger than 3x3.
        zeros: share of the weights that int8 rounds to zero, with a scale for each channel.
        zeros_per_tensor: share of the weights that int8 rounds to zero, with one scale for the layer.
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
        name: name in `named_modules`.
        shape: shape of its weight.
        kept: whether it stays in float32.
        sensitivity: relative L2 difference of the logits when only this layer is in int8; None if all layers together
            lose little enough, so that no search was needed.
        ranges: ranges of its weight.
    """

    name: str
    shape: tuple[int, ...]
    kept: bool
    sensitivity: float | None
    ranges: Ranges


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The result of a search for a file in int8. Accuracies and losses are shares from 0 to 1.

    Args:
        images: number of images that the search scored.
        before: accuracy of the file in float32.
        all_int8: accuracy with every layer in int8.
        after: accuracy of the written file.
        lost_all_int8: share of the images that are right in float32 and wrong with every layer in int8.
        lost: share of the images that are right in float32 and wrong in the written file.
        bytes_before: size of the file in float32 and its weights, bytes.
        bytes_after: size of the written file and its weights, bytes.
        trials: number of selections of layers that were scored.
        layers: the layers, in the order of the network.
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
    """Write a classifier in int8 that loses at most `loss`, with few layers in float32.

    The search first tries all layers in int8. If that loses too much, it measures each layer alone in int8. The most
    sensitive layers then stay in float32; bisection finds the smallest number that is enough. The loss counts right
    answers that become wrong, and does not subtract wrong answers that become right. Else lucky answers could hide
    damage: a network is right on nearly all of its training images.

    Args:
        model: a classifier of replknet's in any form, any dtype and on any device; it stays unchanged.
        card: the card for the file.
        path: ends as `ENDINGS` says. Only a file that passes replaces an existing one.
        to: "onnx" writes QuantizeLinear and DequantizeLinear for ONNX Runtime; "openvino" uses NNCF.
        calibration: batches of prepared images `[N,3,H,W]`, float32. They give the ranges of the layers' inputs.
        scored: batches of prepared images and labels `[N]` that measure accuracy, without test images; batches of None
            are skipped. The search iterates over them several times.
        loss: right answers that may become wrong, percentage points. The accuracy falls by no more.
        per_channel: False for one scale for each weight, to see what that costs.

    Returns:
        The measurements, and the layers with the ranges of their weights.

    Raises:
        ValueError: the path has another ending, the loss is negative, or there are no images.
        AccuracyError: the loss is larger even with `MOST_FLOAT` of the layers in float32; no file is written.
        RuntimeError: the exported network in float32 differs from torch's.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS[to]):
        raise ValueError(f"a file in int8 for {to} ends in {ENDINGS[to]}, got {path.name}")
    if not loss >= 0:
        raise ValueError(f"the loss that is allowed must be 0 points or more, got {loss}")
    if not sum(map(len, calibration)):
        raise ValueError("calibration needs at least one image, got none")
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
                    f"int8 loses {cost([]):.2f} points of right answers on {len(right)} images, and "
                    f"{cost(order[:most]):.2f} with the {most} most sensitive of {len(names)} layers in float32; "
                    f"{loss} are allowed. No file was written. More images for calibration may help"
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
    """The ranges of the weight `[channels,...]` of a convolution or linear layer."""
    w = weight.detach().double().flatten(1).abs()
    largest, rms = w.amax(1), w.square().mean(1).sqrt()
    alive = rms > 0
    # a channel's largest weight is 127 steps of int8
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
    """Bytes of a file. For OpenVINO this includes the weights beside it."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)


def timed(files: Mapping[str, Path], x: Tensor, threads: int, runs: int = 30) -> dict[str, Timing]:
    """Time files in turns on one batch of images `[N,3,H,W]`. Each runs in its own runtime with `threads` threads."""
    runners = {name: loaded(path, threads) for name, path in files.items()}
    return interleaved({name: partial(run, x) for name, run in runners.items()}, runs)


class _Search:
    """Files with different layers in float32, and the images that each classifies right.

    Args:
        name: name of every file.
        folder: each file has its own folder below this one.
        quantizer: writes a file.
        scored: batches of images and labels.
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
        """Whether a file classifies each image right: `[N]`, bool."""
        run = loaded(file, self._threads)
        right = [run(x)[0].argmax(1) == labels for x, labels in filter(None, self._scored)]
        if not right:
            raise ValueError("the search needs at least one image to measure accuracy, got none")
        return torch.cat(right)

    def tried(self, float_layers: Collection[str]) -> Tensor:
        """Whether each image is right with these layers in float32: `[N]`, bool."""
        key = frozenset(float_layers)
        if key not in self._tried:
            file = self._written(float_layers)
            self._tried[key] = file.parent, self.right(file)
        return self._tried[key][1]

    def folder_of(self, float_layers: Collection[str]) -> Path:
        """The folder of the file that was tried with these layers in float32."""
        return self._tried[frozenset(float_layers)][0]

    def sensitivities(self, source: Path, names: Sequence[str]) -> dict[str, float]:
        """For each layer: relative L2 difference of the logits from `source` when only this layer is in int8."""
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
    """The smallest number that fits, by bisection. 0 is known not to fit; None if `most` does not fit either."""
    if most == 0 or not fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
