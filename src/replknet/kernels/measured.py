"""The default on CUDA devices: Triton's kernels or torch's own convolution, whichever is faster there.

The first call of a kind times both, forward and for each gradient (`triton_tune`), after Triton's kernels were compared
with the definition (`triton_check`). Where nothing may be timed (REPLKNET_AUTOTUNE=0, deterministic algorithms), 16-bit
types with kernels from 13x13 on take Triton's, and all else torch's. REPLKNET_BACKEND=aten turns all of it off.
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
