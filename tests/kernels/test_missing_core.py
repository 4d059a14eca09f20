"""An installation without the C++ core: one warning at the first call that the core would take, and no other."""

import warnings

import pytest
import torch

from replknet import kernels
from replknet.kernels import Call, native, native_core, use_backend
from replknet.ops import call as calls
from replknet.ops import depthwise_conv2d, doctor


@pytest.fixture
def without_core(monkeypatch):
    """Hides the core; choices that were made with it, or will be made without it, are forgotten."""

    def forget():
        calls._ACCEPTED.clear()
        kernels._chosen.cache_clear()
        native_core.warn_missing.cache_clear()

    forget()
    monkeypatch.setattr(native_core, "library", lambda: None)
    yield
    monkeypatch.undo()
    forget()


def said(size, dtype=torch.float32):
    """The warnings of one call with a gradient."""
    x, weight = torch.randn(1, 4, size, size, dtype=dtype), torch.randn(4, 1, 7, 7, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        depthwise_conv2d(x, weight).sum().backward()
    return [str(one.message) for one in found]


@pytest.mark.usefixtures("without_core")
def test_the_first_call_without_a_core_warns_and_the_others_do_not():
    (text,) = said(8)
    assert "C++ core is missing, so torch's own convolution is used" in text
    assert "on Linux with a C++ compiler `pip install .` in a clone of replknet builds it" in text
    assert "\n" not in text
    assert said(8) == said(9) == said(10, torch.bfloat16) == []


@pytest.mark.usefixtures("without_core")
def test_the_way_to_stop_the_warning_stops_it(set_variable):
    set_variable("REPLKNET_BACKEND", "aten")
    assert said(8) == []


@pytest.mark.usefixtures("without_core")
def test_a_backend_that_was_chosen_by_name_and_a_call_that_is_not_the_cores_give_no_warning():
    with use_backend("reference"):
        assert said(8) == []
    assert said(8, torch.float64) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doctor()
    assert len(said(8)) == 1


@pytest.mark.usefixtures("without_core")
def test_a_gpu_does_not_miss_the_core():
    call = Call(shape=(1, 4, 8, 8), kernel=(7, 7), dtype=torch.float32, device="cpu")
    assert native.misses_core(call)
    for device in ("cuda", "meta", "mps"):
        assert not native.misses_core(Call(shape=call.shape, kernel=call.kernel, dtype=call.dtype, device=device))


def test_with_the_core_nothing_is_said():
    native_core.warn_missing.cache_clear()
    assert said(11) == []
