"""Who looks at a call besides autograd: exporters, tracers, `torch.func` and forward-mode AD.

Torch does not document two of the names used here. `tests/ops/test_transforms.py` fails on a torch that lacks one of
them. On such a torch the dispatcher still finds calls inside `torch.func` (`derivatives` registers kernels for them).
Each tensor is then asked whether it has a tangent.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch 2.10 to 2.14: whether a torch.func transform (grad, vmap, jvp, ...) is at work in this thread
_functorch_is_active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)


def differentiates_forward(*tensors: Tensor | None) -> bool:
    """Whether a tensor may carry a tangent of forward-mode AD, which the operator's kernels would drop."""
    level: int | None = getattr(forward_ad, "_current_level", None)
    if level is not None:
        return level >= 0
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def must_be_plain(*tensors: Tensor | None) -> bool:
    """Whether the call must be torch's own convolution.

    Exported and traced files must run without this package. `torch.func` and forward-mode AD have rules for torch's
    convolution, but none for ours.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    if _functorch_is_active is not None and _functorch_is_active():
        return True
    return differentiates_forward(*tensors)
