"""Checks on a machine with a CUDA device: correctness first, then times.

It runs with torch, timm and numpy alone, from a source tree: `PYTHONPATH=src python3 -m replknet.bench.gpu`.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from replknet.bench.cases import CASES, Case
from replknet.bench.harness import interleaved
from replknet.kernels import BACKENDS, Call, reference

# of the channel's rms: rounding of the result to the dtype, with room for TF32-free float32 sums
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def main() -> int:
    """Compare every backend that takes CUDA calls with the float64 reference, then time it; 1 for an error."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results = [_check(case, dtype) for case in CASES for dtype in _BOUNDS]
    return 0 if all(results) else 1


def _check(case: Case, dtype: torch.dtype) -> bool:
    """One case on every automatic backend that takes it: whether all results are right."""
    x = torch.randn(case.shape, device="cuda", dtype=dtype)
    dy = torch.randn_like(x)
    w = (torch.randn(case.shape[1], 1, case.kernel, case.kernel, device="cuda") / case.kernel).to(dtype)
    truth = reference.forward(x.double(), w.double(), None, False)
    dw = reference.backward(dy.double(), x.double(), w.double(), [False, True, False])[1]
    call = Call(shape=case.shape, kernel=(case.kernel, case.kernel), dtype=dtype, device="cuda")
    good = True
    for backend in BACKENDS:
        # the Triton kernels are not chosen before they were seen to be right here
        if backend is reference.BACKEND or backend.refusal(call) is not None:
            continue
        forward = partial(backend.forward, x, w, None, False, "direct")
        found = forward(), backend.backward(dy, x, w, [False, True, False], "direct")[1]
        errors = [_relative(f, t) for f, t in zip(found, (truth, dw), strict=True)]
        text = f"{case.name} {dtype} {backend.name}: y {errors[0]:.1e}, dw {errors[1]:.1e}"
        if not max(errors) <= _BOUNDS[dtype]:
            print(f"{text} WRONG, bound {_BOUNDS[dtype]:.0e}")
            good = False
            continue
        backward = partial(backend.backward, dy, x, w, [True, True, False], "direct")
        times = interleaved({"forward": forward, "backward": backward})
        print(f"{text}; " + ", ".join(f"{name} {t.p50_ms:.3f} ms" for name, t in times.items()))
    return good


def _relative(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None
    assert truth is not None
    return ((found.double() - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    sys.exit(main())
