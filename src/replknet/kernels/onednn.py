"""What the oneDNN inside torch can do, where torch has no public name for it.

The ops are private: torch lacks them where it was built without oneDNN, and a later torch may rename them. A missing op
is an answer here and no error.
"""

import torch


def packs_matrices() -> bool:
    """Whether torch keeps matrices in oneDNN's own form, and has products of them with an activation or a sum."""
    try:
        needed = (torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise.binary)
    except AttributeError:
        return False
    return torch.backends.mkldnn.is_available() and all(map(callable, needed))


def computes_bfloat16() -> bool | None:
    """Whether oneDNN computes in bfloat16 on this processor; None where torch does not say.

    torch.cpu.get_capabilities() is public and answers another question: oneDNN computes in bfloat16 with AVX-512 alone,
    and its own limit (ONEDNN_MAX_CPU_ISA) is not among the capabilities.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:
        return None
