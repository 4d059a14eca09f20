"""The operator's ops as torch's dispatcher knows them: their names and schemas.

There are two ops, each with its gradient:

- `replknet::depthwise_conv2d` knows its derivatives. It is the op of compiled graphs and of saved programs.
- `replknet::_depthwise_conv2d` computes, and autograd passes it by. Below autograd only this op remains, so compilers,
  modes, counters, profilers and tensor subclasses see it.

An eager call goes through `derivatives.recorded`, a `torch.autograd.Function` around the second op. A Python kernel at
autograd's place in the dispatcher would cost more than the convolution of a small map. The schemas are fixed: a change
would break saved `.pt2` files.
"""

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]

_FORWARD = "(Tensor x, Tensor weight, Tensor? bias, bool relu, str algorithm) -> Tensor"
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, bool[] wanted, str algorithm) -> (Tensor, Tensor, Tensor)"  # dx, dw, db
)
library = torch.library.Library("replknet", "DEF")
for _prefix in ("", "_"):
    library.define(f"{_prefix}depthwise_conv2d{_FORWARD}", tags=torch.Tag.pt2_compliant_tag)
    library.define(f"{_prefix}depthwise_conv2d_backward{_BACKWARD}", tags=torch.Tag.pt2_compliant_tag)

differentiable = torch.ops.replknet.depthwise_conv2d.default
computing = torch.ops.replknet._depthwise_conv2d.default
computing_backward = torch.ops.replknet._depthwise_conv2d_backward.default
