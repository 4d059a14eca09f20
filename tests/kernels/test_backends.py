"""Every backend against the float64 definition, in y, dx, dw and db, over odd shapes, dtypes and layouts."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from matrix import FULL
from oracle import excess
from replknet.kernels import BACKENDS, Call, choose, forced, reference, refusals, use_backend

TILES = (1, 17, 90, 150, 31, 31)  # several tiles each way, in backends that have tiles
SHAPES = [  # n, c, h, w, kh, kw
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 5, 5),  # kernel larger than the image
    (2, 3, 4, 5, 13, 7),
    (2, 3, 9, 7, 3, 3),
    (3, 5, 7, 12, 1, 9),  # rectangular
    (2, 4, 14, 14, 27, 27),
    (1, 33, 7, 7, 13, 13),
    (2, 8, 20, 37, 31, 5),
    (5, 2, 19, 6, 5, 31),
    (1, 1, 40, 3, 9, 9),
    TILES,
    (1, 16, 40, 36, 51, 5),
    (1, 20, 36, 40, 5, 51),
    (2, 16, 20, 40, 1, 11),
    (9, 300, 3, 3, 5, 5),  # more image-channel pairs than one call of aten's weight gradient takes
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@lru_cache(128)  # every backend gets the same values in both layouts, and the oracle knows them again
def values(n, c, h, w, kh, kw, dtype):
    x, dy = (torch.randn(n, c, h, w).to(dtype) for _ in range(2))
    return x, (torch.randn(c, 1, kh, kw) / max(kh, kw)).to(dtype), dy


def sample(n, c, h, w, kh, kw, dtype, layout=torch.contiguous_format):
    x, weight, dy = values(n, c, h, w, kh, kw, dtype)
    return x.contiguous(memory_format=layout), weight, dy.contiguous(memory_format=layout)


def takes(backend, shape, dtype, algorithm):
    n, c, h, w, kh, kw = shape
    call = Call(shape=(n, c, h, w), kernel=(kh, kw), dtype=dtype, device="cpu", algorithm=algorithm)
    return backend.refusal(call) is None


WAYS = [
    pytest.param(
        *(backend, algorithm, dtype, shape),
        id=f"{backend.name}-{algorithm}-{str(dtype).removeprefix('torch.')}-{shape}",
        # torch's own convolution takes seconds for it
        marks=[FULL] if shape == TILES and backend.name != "native" else [],
    )
    for backend in BACKENDS
    for algorithm in ("direct", "fft")
    for dtype in DTYPES
    for shape in SHAPES
    if takes(backend, SHAPES[-1], dtype, algorithm)
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("backend", "algorithm", "dtype", "shape"), WAYS)
def test_backend_keeps_the_bound(backend, algorithm, shape, dtype, layout):
    found = excess(backend, *sample(*shape, dtype, layout), algorithm)
    assert max(found.values()) <= 1, found


@settings(max_examples=30)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 9),
    h=st.integers(1, 24),
    w=st.integers(1, 24),
    kh=st.integers(0, 20).map(lambda i: 2 * i + 1),
    kw=st.integers(0, 20).map(lambda i: 2 * i + 1),
    dtype=st.sampled_from(DTYPES[1:]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    algorithm=st.sampled_from(["direct", "fft"]),
)
@pytest.mark.parametrize(
    "backend",
    [b for b in BACKENDS if b.automatic and takes(b, SHAPES[-1], torch.float32, "direct")],
    ids=lambda backend: backend.name,
)
def test_backend_keeps_the_bound_on_any_shape(backend, n, c, h, w, kh, kw, dtype, layout, algorithm):
    if not takes(backend, (n, c, h, w, kh, kw), dtype, algorithm):
        algorithm = "direct"
    found = excess(backend, *sample(n, c, h, w, kh, kw, dtype, layout), algorithm)
    assert max(found.values()) <= 1, found


def test_reference_is_torchs_convolution_in_float64():
    x, w, _ = sample(2, 3, 9, 8, 7, 5, torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    expected = conv2d(x, w, bias, padding=(3, 2), groups=3)
    torch.testing.assert_close(reference.forward(x, w, bias, False), expected)


def test_the_oracle_rejects_a_wrong_kernel():
    x, w, dy = sample(1, 2, 6, 6, 3, 3, torch.float32)
    shifted = reference.forward(x, w.roll(1, 3), None, False)
    wrong = reference.BACKEND.__class__(
        name="wrong",
        refusal=reference.BACKEND.refusal,
        forward=lambda *_: shifted,
        backward=reference.backward,
    )
    assert excess(wrong, x, w, dy)["y"] > 100


def test_unwanted_gradients_are_none():
    x, w, dy = sample(1, 2, 6, 6, 5, 5, torch.float32)
    for backend in (b for b in BACKENDS if takes(b, (1, 2, 6, 6, 5, 5), x.dtype, "direct")):
        assert backend.backward(dy, x, w, [False, False, False]) == (None, None, None)
        assert backend.backward(dy, x, w, [False, True, False])[0] is None


CALL = Call(shape=(1, 2, 8, 8), kernel=(7, 7), dtype=torch.float32, device="cpu")
# no backend has the fft algorithm in float64
REFUSED = Call(shape=(1, 2, 8, 8), kernel=(5, 5), dtype=torch.float64, device="cpu", algorithm="fft")


def test_reference_is_never_chosen_unless_forced():
    assert choose(CALL).name == "native"
    with use_backend("reference"):
        assert choose(CALL).name == "reference"
    assert choose(CALL).name == "native"


def test_environment_forces_a_backend_and_use_backend_goes_first(set_variable):
    set_variable("REPLKNET_BACKEND", "reference")
    assert choose(CALL).name == forced() == "reference"
    with use_backend("aten"):
        assert choose(CALL).name == "aten"


def test_use_backend_stays_without_with():
    use_backend("reference")
    try:
        assert choose(CALL).name == "reference"
    finally:
        use_backend(None)
    assert choose(CALL).name == "native"


def test_unknown_backend_is_named_with_the_known_ones(set_variable):
    with pytest.raises(
        ValueError, match="no backend is called 'cutlass'; there are native, measured, triton, aten, reference"
    ):
        use_backend("cutlass")
    set_variable("REPLKNET_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="REPLKNET_BACKEND=cutlass: no backend is called 'cutlass'"):
        choose(CALL)


def test_a_call_that_nobody_takes_gives_every_reason():
    with pytest.raises(RuntimeError, match=r"no backend takes this call: x \[1, 2, 8, 8\] float64") as info:
        choose(REFUSED)
    for name, why in refusals(REFUSED).items():
        assert f"{name}: {why}" in str(info.value)


def test_a_forced_backend_that_refuses_is_an_error():
    with (
        use_backend("aten"),
        pytest.raises(RuntimeError, match="backend 'aten', which is forced, does not take this call"),
    ):
        choose(REFUSED)


def test_a_backend_that_declines_is_passed_by_unless_it_is_named_or_alone():
    call = Call(shape=(8, 96, 56, 56), kernel=(3, 3), dtype=torch.float32, device="cpu", channels_last=True)
    assert choose(call).name == "aten"
    with use_backend("native"):
        assert choose(call).name == "native"
    assert choose(replace(call, algorithm="fft")).name == "native"
    # a small call costs more through torch, and torch has no fast contiguous form
    assert choose(replace(call, shape=(1, 16, 8, 8))).name == "native"
    assert choose(replace(call, channels_last=False)).name == "native"
