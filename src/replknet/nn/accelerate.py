"""Put the operator into any network."""

from dataclasses import dataclass, field

from torch import nn

from replknet.kernels import Algorithm
from replknet.nn.depthwise import DepthwiseConv2d, StridedDepthwiseConv2d, checked


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: `str()` is for people."""

    replaced: list[str]  # names of the convolutions that now run on the operator
    left: dict[str, str]  # name of every other convolution -> why it stayed
    changed: list[str] = field(default_factory=list)  # names of layers already on the operator with a new algorithm
    _swaps: list[tuple[nn.Module, str, nn.Conv2d]] = field(default_factory=list, repr=False)
    _algorithms: list[tuple[DepthwiseConv2d | StridedDepthwiseConv2d, Algorithm]] = field(
        default_factory=list, repr=False
    )

    def undo(self) -> None:
        """Put the original modules and algorithms back; the parameters keep their current values."""
        for parent, name, original in self._swaps:
            current = getattr(parent, name)
            original.weight, original.bias = current.weight, current.bias
            setattr(parent, name, original.train(current.training))
        self._swaps.clear()
        for module, algorithm in self._algorithms:
            module.algorithm = algorithm
        self._algorithms.clear()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} convolutions run on the operator, {len(self.left)} stay"]
        if self.changed:
            lines.append(f"  {len(self.changed)} were on the operator already and got another algorithm")
        reasons = list(self.left.values())
        lines += [f"  {reasons.count(why)} {why}" for why in sorted(set(reasons))]
        return "\n".join(lines)


def accelerate(model: nn.Module, algorithm: Algorithm = "auto") -> Report:
    """Run the depthwise convolutions of any network on the operator, in place.

    A child becomes a `DepthwiseConv2d` if it is an `nn.Conv2d` (no subclass) with one kernel a channel, and stride and
    dilation 1. Its sides must be odd and above 1x1, with zero padding of half the kernel; it must have no hooks. It
    keeps the *same* Parameter objects, so optimisers and state dicts go on as before. A convolution used in several
    places stays shared.

    Args:
        model: any network. A model that is itself a convolution stays: no parent module can hold the new one.
        algorithm: "direct", "fft" or "auto", as in `replknet.ops.depthwise_conv2d`. "direct" and "fft" are also set
            on layers that already run on the operator.

    Returns:
        What was replaced or changed, what was left and why. Its `undo()` restores the original modules.

    Raises:
        ValueError: no algorithm has that name.
    """
    checked(algorithm)
    report = Report(replaced=[], left={})
    new: dict[nn.Module, DepthwiseConv2d] = {}
    if isinstance(model, nn.Conv2d) and not isinstance(model, DepthwiseConv2d):
        report.left["(the model)"] = "has no parent module to hold another one"
    for path, parent in list(model.named_modules()):
        # not named_children(), which yields a module with two names only once
        for name, child in list(parent._modules.items()):
            if not isinstance(child, nn.Conv2d) or isinstance(child, DepthwiseConv2d):
                continue
            full = f"{path}.{name}" if path else name
            why = _reason_to_stay(child)
            if why is not None:
                report.left[full] = why
                continue
            if child not in new:
                new[child] = _on_operator(child, algorithm)
            setattr(parent, name, new[child])
            report.replaced.append(full)
            report._swaps.append((parent, name, child))
    if algorithm != "auto":
        _change(model, algorithm, set(new.values()), report)
    return report


def _change(model: nn.Module, algorithm: Algorithm, but: set[DepthwiseConv2d], report: Report) -> None:
    """Set the algorithm of the layers that were on the operator before."""
    for name, module in model.named_modules():
        on_operator = isinstance(module, DepthwiseConv2d | StridedDepthwiseConv2d)
        if on_operator and module not in but and module.algorithm != algorithm:
            report.changed.append(name)
            report._algorithms.append((module, module.algorithm))
            module.algorithm = algorithm


def _reason_to_stay(conv: nn.Conv2d) -> str | None:
    kh, kw = conv.kernel_size
    hooks = (
        conv._forward_hooks,
        conv._forward_pre_hooks,
        conv._backward_hooks,
        conv._backward_pre_hooks,
        conv._state_dict_hooks,
        conv._load_state_dict_pre_hooks,
    )
    tests = {
        "not depthwise": not conv.in_channels == conv.out_channels == conv.groups,
        f"a subclass of nn.Conv2d ({type(conv).__name__})": type(conv) is not nn.Conv2d,
        "has hooks": any(hooks),
        f"{conv.padding_mode} padding": conv.padding_mode != "zeros",
        f"stride {conv.stride}": conv.stride != (1, 1),
        f"dilation {conv.dilation}": conv.dilation != (1, 1),
        f"even kernel {kh}x{kw}": kh % 2 == 0 or kw % 2 == 0,
        f"padding {conv.padding} with kernel {kh}x{kw}": conv.padding not in ("same", (kh // 2, kw // 2)),
        "1x1 kernel": kh == kw == 1,
    }
    return next((why for why, holds in tests.items() if holds), None)


def _on_operator(conv: nn.Conv2d, algorithm: Algorithm) -> DepthwiseConv2d:
    """A DepthwiseConv2d with the Parameter objects of `conv`."""
    kh, kw = conv.kernel_size
    new = DepthwiseConv2d(conv.in_channels, (kh, kw), bias=conv.bias is not None, device="meta", algorithm=algorithm)
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)
