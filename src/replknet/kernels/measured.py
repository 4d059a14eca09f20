"""The default on CUDA devices: Triton's kernels or torch's own convolution, whichever is faster there.

The first call of a kind compares Triton's kernels with the definition (`triton_check`). It then times both, forward and
for each gradient (`triton_tune`). REPLKNET_AUTOTUNE=0 and deterministic algorithms forbid timing: then 16-bit types
with kernels from 13x13 on take Triton's kernels, and all other calls take torch's convolution. With
REPLKNET_BACKEND=aten all calls take torch's convolution.
"""

from replknet.kernels.backend import Backend
from replknet.kernels.triton import explanation, refusal_on_device
from replknet.kernels.triton_choice import MEASURED

BACKEND = Backend(
    name="measured",
    refusal=refusal_on_device,
    forward=MEASURED.forward,
    backward=MEASURED.backward,
    explanation=explanation,
)
