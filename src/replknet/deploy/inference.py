"""From a trained network to the form in which it runs fastest here."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replknet.deploy.inference_layers import packs
from replknet.deploy.rewrite import Rewriter, cast, folded
from replknet.deploy.verify import AccuracyError, Difference, worst
from replknet.difference import largest_difference
from replknet.kernels.malloc import keep_freed_memory
from replknet.nn.merge import unfolded_norms
from replknet.timing import Timing, interleaved

# largest relative L2 difference between an output and the source's; most of a large difference is rounding in the
# source, which has more steps
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TIMED_RUNS = 5
_LAYERS, _COMPILED = "layer by layer", "torch.compile"


@dataclass(frozen=True)
class Changes:
    """What `optimize` made of a network; `str()` of it is for people.

    Args:
        products: 1x1 convolutions that are matrix products.
        packed: whether their matrices are in oneDNN's form.
        operator: large and small depthwise convolutions on the operator, with their ReLU in it.
        winograd: dense 3x3 convolutions by Winograd's method.
        unfolded: names of the batch norms that stay.
        dtype: of the computation.
        difference: largest difference from the source's outputs on the example.
        bound: largest relative difference that is allowed.
        times: of both forms, where torch.compile was asked for; else empty.
        compiled: whether the compiled form was the faster one, which is used.
    """

    products: int
    packed: bool
    operator: int
    winograd: int
    unfolded: tuple[str, ...]
    dtype: torch.dtype
    difference: Difference
    bound: float
    times: Mapping[str, Timing] = field(default_factory=dict)
    compiled: bool = False

    def __str__(self) -> str:
        form = ", their matrices packed by oneDNN" if self.packed else ""
        lines = [
            f"{self.products} 1x1 convolutions as matrix products{form}",
            f"{self.operator} depthwise convolutions with their ReLU on the operator",
            f"{self.winograd} dense 3x3 convolutions by Winograd's method",
            f"batch norms that stay: {', '.join(self.unfolded) or 'none'}",
            f"in {self.dtype}, outputs differ by {self.difference.relative:.1e} of their norm (bound {self.bound:.0e})",
        ]
        lines += [f"{name}: {time.p50_ms:.1f} ms on the example" for name, time in self.times.items()]
        return "\n".join(lines)


class Optimized(nn.Module):
    """A network in its inference form, made by `optimize`.

    It has no parameters to train. It is not saved: `optimize` makes it anew from its source.

    Args:
        network: the layers.
        dtype: of their computation.
        report: what was done.

    Input: as the source's, `[N,3,H,W]` of any batch and size that the source takes.
    Output: as the source's, in the dtype of the input; computed in `torch.inference_mode`.

    Raises:
        ValueError: the input is not `[N,C,H,W]`.
    """

    def __init__(self, network: Callable[[Tensor], Any], dtype: torch.dtype, report: Changes) -> None:
        super().__init__()
        # a tuple, so state_dict() does not see the layers
        self._network = (network,)
        self.dtype, self.report = dtype, report
        self.training = False

    @property
    def network(self) -> Callable[[Tensor], Any]:
        """The layers, whose input is channels_last and of `dtype`."""
        return self._network[0]

    def forward(self, x: Tensor) -> Any:
        if x.ndim != 4:
            raise ValueError(f"x must be [N,C,H,W], got {x.ndim} dimensions {list(x.shape)}; x[None] adds a batch")
        with torch.inference_mode():
            found = self._network[0](_prepared(x, self.dtype))
            return (
                self._given(found, x.dtype) if isinstance(found, Tensor) else [self._given(y, x.dtype) for y in found]
            )

    def _given(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        # the next call of a CUDA graph overwrites what this one returned
        return y.to(dtype, copy=self.report.compiled and y.is_cuda)

    def train(self, mode: bool = True) -> "Optimized":
        """Only `train(False)`, which changes nothing.

        Raises:
            RuntimeError: a mode for training is asked for.
        """
        if mode:
            raise RuntimeError("a network in its inference form cannot be trained; train its source, and optimize it")
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise RuntimeError(
            "a network in its inference form is of this machine and is neither copied nor saved: save its source, and "
            "optimize what is loaded"
        )


def optimize(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    keep_memory: bool = False,
) -> Optimized:
    """The inference form of a classifier, of a backbone with features, or of a segmentation network.

    Branches are merged and batch norms folded. Maps stay in channels_last from end to end.

    - 1x1 convolutions become matrix products, with bias, ReLU, GELU or shortcut in the same step.
    - Depthwise convolutions run on the operator with their ReLU.
    - Dense 3x3 convolutions of many channels on large maps use Winograd's method, in float32 on a CPU. Its matrices
      take four times the memory of the kernels.
    - Large batches and maps are worked on in parts that fit into the cache, so memory grows less than the batch.
    - Layers without a rule in `replknet.deploy.rewrite` stay as they are.

    Args:
        model: trained or merged, on any device and in any mode; it stays as it was.
        example: images `[N,3,H,W]` of the usual size, with the model's device and dtype. The result is checked and
            timed on them. Other batches and sizes work, too.
        dtype: to compute in, such as torch.bfloat16; None for the model's own.
        compile: also compile the merged network with torch.compile (on a GPU with CUDA graphs), time both on the
            example, and keep the faster. A compiled network is compiled anew for other sizes.
        keep_memory: on a CPU with glibc, have the whole process keep freed memory for the next image. Otherwise glibc
            gives large blocks back and clears their pages again for each image: maps of more than 32 MB are slower,
            and memory is less.

    Returns:
        A module that is called as the model is.

    Raises:
        ValueError: an example or a dtype that does not fit.
        AccuracyError: an output differs from the model's by more of its norm than `BOUNDS` allows for the less exact
            dtype of both.

    Source of the folding: Ding et al. 2022, arXiv:2203.06717, section 3, guideline 3.
    """
    if keep_memory and example.device.type == "cpu":
        keep_freed_memory()
    parameter = next(model.parameters())
    _check(example, parameter)
    dtype = parameter.dtype if dtype is None else dtype
    if dtype not in BOUNDS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, BOUNDS))}, got {dtype}")
    bound = max(BOUNDS[dtype], BOUNDS.get(parameter.dtype, 0.0))
    # other tensors of the same memory: what the kernels prepare from them is freed with them
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.inference_mode(), _evaluating(model):
        wanted = _outputs(torch.func.functional_call(model, weights, (example,)))
    del weights
    prepared = _prepared(example, dtype)
    source = cast(folded(model), dtype).to(memory_format=torch.channels_last)
    on_cpu = example.device.type == "cpu"
    # a compiler cannot look into packed matrices
    unpacked = copy.deepcopy(source) if compile and on_cpu else None
    rewriter = Rewriter(source, prepared)
    network = rewriter.rewritten()
    ways: dict[str, Callable[[Tensor], Any]] = {_LAYERS: network}
    if unpacked is not None:
        ways[_COMPILED] = torch.compile(unpacked, options={"freezing": True})
    elif compile:
        ways[_COMPILED] = torch.compile(network, mode="reduce-overhead")
    with torch.inference_mode():
        difference = worst([_compared(name, wanted, _outputs(way(prepared)), bound) for name, way in ways.items()])
        calls = {name: partial(way, prepared) for name, way in ways.items()}
        times = interleaved(calls, _TIMED_RUNS) if len(ways) > 1 else {}
    fastest = min(times, key=lambda name: times[name].p50_ms, default=_LAYERS)
    report = Changes(
        products=rewriter.products,
        packed=packs(prepared),
        operator=rewriter.operator,
        winograd=rewriter.winograd,
        unfolded=tuple(unfolded_norms(network)),
        dtype=dtype,
        difference=difference,
        bound=bound,
        times=times,
        compiled=fastest == _COMPILED,
    )
    return Optimized(ways[fastest], dtype, report)


def _check(example: Tensor, parameter: Tensor) -> None:
    if example.ndim != 4:
        raise ValueError(f"example must be images [N,3,H,W], got {list(example.shape)}")
    if example.dtype != parameter.dtype or example.device != parameter.device:
        raise ValueError(
            f"example must have the model's dtype and device, {parameter.dtype} on {parameter.device}, got "
            f"{example.dtype} on {example.device}; example.to(next(model.parameters())) converts"
        )


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _compared(way: str, wanted: Sequence[Tensor], got: Sequence[Tensor], bound: float) -> Difference:
    """The largest difference of all outputs.

    Raises:
        AccuracyError: it is above the bound.
    """
    found = []
    for one, other in zip(wanted, got, strict=True):
        if other.shape != one.shape:
            raise AccuracyError(f"{way}: an output must be {list(one.shape)}, got {list(other.shape)}")
        found.append(Difference(*largest_difference(one, other)))
    largest = worst(found)
    # a NaN fails, too
    if not largest.relative <= bound:
        raise AccuracyError(
            f"{way}: an output may differ from the source's by {bound:.0e} of its norm, got {largest.relative:.1e}; "
            "no inference form was made. A network that amplifies rounding needs a longer dtype; else look whether the "
            "example's images are normalised and the source's outputs finite"
        )
    return largest
