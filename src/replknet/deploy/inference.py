"""From a trained network to the form in which it runs fastest here."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replknet.deploy.inference_layers import (
    Activation,
    Convolution,
    Depthwise,
    FeedForward,
    Grouped,
    LargeKernelBlock,
    Pointwise,
    packs,
    product_of,
)
from replknet.deploy.verify import Difference, worst
from replknet.deploy.winograd import Winograd
from replknet.difference import largest_difference
from replknet.kernels.malloc import keep_freed_memory
from replknet.models.timm_model import Stage, StagedNet
from replknet.nn import ConvFFN, DepthwiseConv2d, RepLKBlock, merge
from replknet.nn.conv_bn import ConvBN, affine, set_weight_and_bias, weight_and_bias
from replknet.nn.merge import unfolded_norms
from replknet.tasks.segmentation.inference_form import PyramidHead
from replknet.timing import Timing, interleaved

# relative L2 difference of an output from the source's that is allowed; where it is large, most of it is rounding of
# the source, whose norms and branches are steps of their own
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# channels and pixels from which on Winograd's method pays, for its transforms and for the memory of its matrices
_WINOGRAD_CHANNELS, _WINOGRAD_PIXELS = 64, 2048
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
        dtype: in which it computes.
        difference: the largest from the source's outputs on the example.
        bound: the relative one that is allowed.
        times: of both forms, where torch.compile was asked for; empty otherwise.
        compiled: whether that was the faster, and is used.
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

    It has no parameters to train, and is made anew from its source rather than saved.

    Args:
        network: the layers.
        dtype: in which they compute.
        report: what was done.

    Input: as the source's, `[N,3,H,W]` of any batch and size that the source takes.
    Output: as the source's, in the dtype of the input; computed in `torch.inference_mode`.

    Raises:
        ValueError: the input is not `[N,C,H,W]`.
    """

    def __init__(self, network: Callable[[Tensor], Any], dtype: torch.dtype, report: Changes) -> None:
        super().__init__()
        # in a tuple: of its layers no state is to be had
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

    Branches are merged and batch norms folded. Maps stay in channels_last from end to end; 1x1 convolutions are matrix
    products on them with bias, ReLU, GELU or shortcut in the same step; depthwise convolutions run on the operator with
    their ReLU; dense 3x3 convolutions of many channels on large maps, in float32 on a CPU, by Winograd's method, whose
    matrices take four times the memory of the kernels. Layers that it does not know stay as they are. Large batches and
    maps are worked on in parts that fit into the cache, so memory grows less than the batch.

    Args:
        model: trained or merged, on any device and in any mode; it stays as it was.
        example: images `[N,3,H,W]` on its device, in its dtype and of the usual size: on them the result is checked and
            timed. Other batches and sizes work, too.
        dtype: to compute in, such as torch.bfloat16; None for the model's own.
        compile: also compile the merged network with torch.compile (on a GPU with CUDA graphs), time both on the
            example, and keep the faster. A compiled network is compiled anew for other sizes.
        keep_memory: on a CPU with glibc, have the whole process keep what it frees for the next image. Otherwise glibc
            gives large blocks back, and their pages are cleared again for each image: maps of more than 32 MB are
            slower, and memory is less.

    Returns:
        A module that is called as the model is.

    Raises:
        ValueError: an example or a dtype that does not fit.
        RuntimeError: an output differs from the model's by more of its norm than `BOUNDS` allows for the less exact of
            both dtypes.

    Source of what is folded: Ding et al. 2022, arXiv:2203.06717, section 3, guideline 3.
    """
    if keep_memory and example.device.type == "cpu":
        keep_freed_memory()
    parameter = next(model.parameters())
    _check(example, parameter)
    dtype = parameter.dtype if dtype is None else dtype
    if dtype not in BOUNDS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, BOUNDS))}, got {dtype}")
    bound = max(BOUNDS[dtype], BOUNDS.get(parameter.dtype, 0.0))
    # by other tensors of the same memory, so that what is prepared from the source's weights leaves with them
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.inference_mode(), _evaluating(model):
        wanted = _outputs(torch.func.functional_call(model, weights, (example,)))
    del weights
    prepared = _prepared(example, dtype)
    folded = _cast(_folded(model), dtype).to(memory_format=torch.channels_last)
    on_cpu = example.device.type == "cpu"
    # a compiler cannot look into packed matrices
    source = copy.deepcopy(folded) if compile and on_cpu else None
    rewriter = _Rewriter(folded, prepared)
    network = rewriter.rewritten()
    ways: dict[str, Callable[[Tensor], Any]] = {_LAYERS: network}
    if source is not None:
        ways[_COMPILED] = torch.compile(source, options={"freezing": True})
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
    """The model in eval mode, and afterwards each module in its own mode again."""
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
    """The largest difference of any output.

    Raises:
        RuntimeError: it is more than the bound.
    """
    found = []
    for one, other in zip(wanted, got, strict=True):
        if other.shape != one.shape:
            raise RuntimeError(f"{way}: an output must be {list(one.shape)}, got {list(other.shape)}")
        found.append(Difference(*largest_difference(one, other)))
    largest = worst(found)
    # a NaN fails, too
    if not largest.relative <= bound:
        raise RuntimeError(
            f"{way}: an output may differ from the source's by {bound:.0e} of its norm, got {largest.relative:.1e}; "
            "no inference form was made. A network that amplifies rounding needs a longer dtype; else look whether the "
            "example's images are normalised and the source's outputs finite"
        )
    return largest


# ---- folding


def _folded(model: nn.Module) -> nn.Module:
    """A merged copy without any norm that can be folded, and without what only training has."""
    network = merge(model).eval().requires_grad_(False)
    for module in network.modules():
        if hasattr(module, "auxiliary_head"):
            setattr(module, "auxiliary_head", None)  # noqa: B010  # mypy thinks that a module has modules alone
        if _is_conv_module(module):
            _fold_after(module)
        if isinstance(module, StagedNet):
            _fold_into_head(module)
    return network


def _is_conv_module(module: nn.Module) -> bool:
    """Whether it is transformers' convolution with norm and ReLU, which is not imported for its name alone."""
    return type(module).__name__ == "UperNetConvModule"


def _fold_after(module: nn.Module) -> None:
    conv, scale_and_shift = module.conv, affine(module.batch_norm)  # type: ignore[arg-type]  # it has both
    if scale_and_shift is None:
        return
    assert isinstance(conv, nn.Conv2d)
    scale, shift = scale_and_shift
    weight, bias = weight_and_bias(conv)
    set_weight_and_bias(conv, weight * scale[:, None, None, None], bias * scale + shift)
    module.batch_norm = nn.Identity()


def _fold_into_head(model: StagedNet) -> None:
    """The last norm into the classifier: the mean of a map that is scaled is the scaled mean."""
    scale_and_shift, head = affine(model.norm), model.head
    if scale_and_shift is None or not isinstance(head, nn.Linear) or model.global_pool.pool_type != "avg":
        return
    scale, shift = scale_and_shift
    weight = head.weight.double()
    bias = weight @ shift + (0 if head.bias is None else head.bias.double())
    head.weight.copy_(weight * scale)
    head.bias = nn.Parameter(bias.to(head.weight), requires_grad=False)
    model.norm = nn.Identity()


class _InFloat32(nn.Module):
    """A classifier's pooling, or the classifier itself, on values of a shorter type, without rounding to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float())
        return y


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another type; for a shorter one than float32, classifiers stay, as they cost next to nothing."""
    heads = {}
    if dtype.itemsize < 4:
        staged = [module for module in network.modules() if isinstance(module, StagedNet)]
        heads = {module: (module.global_pool, module.head) for module in staged if isinstance(module.head, nn.Linear)}
        for module in heads:
            module.global_pool, module.head = nn.Identity(), nn.Identity()
    network = network.to(dtype)
    for module, (pool, head) in heads.items():
        module.global_pool, module.head = _InFloat32(pool), _InFloat32(head.float())
    return network


# ---- layers


_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.GELU: "gelu"}


class _Rewriter:
    """Puts the layers of `rows` and `winograd` into a folded network, in place.

    Args:
        network: in eval mode.
        example: run through it once, to learn how many pixels each convolution sees.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self._network, self._example, self._on_cpu = network, example, example.device.type == "cpu"
        self._rows: dict[nn.Module, int] = {}
        self.products = self.operator = self.winograd = 0

    def rewritten(self) -> nn.Module:
        convs = [module for module in self._network.modules() if isinstance(module, nn.Conv2d)]
        hooks = [conv.register_forward_hook(self._seen) for conv in convs]
        with torch.inference_mode():
            self._network(self._example)
        for hook in hooks:
            hook.remove()
        return self._new(self._network)

    def _seen(self, conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._rows[conv] = output.shape[0] * output.shape[2] * output.shape[3]

    def _new(self, module: nn.Module) -> nn.Module:
        """What takes the module's place; where it is not known itself, its children are replaced."""
        if isinstance(module, RepLKBlock) and isinstance(module.prelkb_bn, nn.Identity):
            return self._large_kernel_block(module)
        if isinstance(module, ConvFFN) and isinstance(module.preffn_bn, nn.Identity):
            first, second = self._product(module.pw1.conv), self._product(module.pw2.conv)
            return FeedForward(first, second, self._example.element_size() if self._on_cpu else None)
        if isinstance(module, ConvBN) and isinstance(module.bn, nn.Identity):
            return self._convolution(module.conv, getattr(module, "nonlinear", None))
        if _is_conv_module(module) and isinstance(module.batch_norm, nn.Identity):
            return self._convolution(module.conv, module.activation)  # type: ignore[arg-type]  # it has both
        if type(module) is nn.Conv2d:
            return self._convolution(module, None)
        for name, child in list(module._modules.items()):
            if child is not None:
                setattr(module, name, self._new(child))
        # transformers keeps the layers of a pyramid's level in a plain list as well
        if isinstance(getattr(module, "layers", None), list):
            setattr(module, "layers", list(module.children()))  # noqa: B010  # as above
        if type(module).__name__ == "UperNetHead":
            return PyramidHead(module)
        if isinstance(module, StagedNet) and self._on_cpu:
            self._group(module)
        return module

    def _product(self, conv: nn.Conv2d) -> Any:
        self.products += 1
        return product_of(conv, self._rows.get(conv, 1))

    def _large_kernel_block(self, block: RepLKBlock) -> nn.Module:
        conv = block.large_kernel.lkb_reparam
        assert conv is not None
        first = self._product(block.pw1.conv)
        return LargeKernelBlock(first, self._convolution(conv, block.lk_nonlinear), self._product(block.pw2.conv))

    def _convolution(self, conv: nn.Conv2d, after: nn.Module | None) -> nn.Module:
        activation: Activation = "none" if after is None else _ACTIVATIONS.get(type(after), "none")
        if isinstance(after, nn.GELU) and after.approximate != "none":
            activation = "none"
        new = self._chosen(conv, activation)
        return new if after is None or activation != "none" else nn.Sequential(new, after)

    def _chosen(self, conv: nn.Conv2d, activation: Activation) -> nn.Module:
        if isinstance(conv, DepthwiseConv2d) and activation == "relu":
            self.operator += 1
            return Depthwise(conv)
        plain = conv.groups == 1 and conv.stride == (1, 1) and conv.padding_mode == "zeros"
        if plain and conv.kernel_size == (1, 1) and conv.padding == (0, 0):
            self.products += 1
            return Pointwise(conv, activation, self._rows.get(conv, 1))
        many = min(conv.in_channels, conv.out_channels) >= _WINOGRAD_CHANNELS
        many = many and self._rows.get(conv, 0) >= _WINOGRAD_PIXELS
        small = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1)
        if plain and small and many and self._on_cpu and conv.weight.dtype == torch.float32:
            self.winograd += 1
            return Winograd(conv, activation)
        return Convolution(conv, activation)

    def _group(self, network: StagedNet) -> None:
        """Have stem, stages and transitions work on a few images at a time."""
        cfg, size = network.cfg, self._example.element_size()
        if not hasattr(cfg, "dw_ratio"):
            return
        # the first convolution of the stem may halve the sides
        first = 4 if cfg.stem_stride >= 2 else 1
        stem = nn.Sequential(*network.stem)
        # an output sees five rows above and below, and one of the 3x3 convolutions of a transition one
        network.stem = nn.ModuleList([Grouped(stem, cfg.channels[0] * size / first, cfg.stem_stride, margin=8)])
        for i, stage in enumerate(network.stages):
            assert isinstance(stage, Stage)
            wide = max(1.0, cfg.dw_ratio) * cfg.channels[i] * size
            stage.blocks = nn.ModuleList([Grouped(nn.Sequential(*stage.blocks), wide)])
            if isinstance(network.transitions[i], nn.Sequential):
                network.transitions[i] = Grouped(network.transitions[i], cfg.channels[i + 1] * size, 2, margin=2)
