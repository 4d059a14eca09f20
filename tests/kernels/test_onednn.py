"""A torch that says nothing of oneDNN is an answer, not an error."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from replknet.deploy.inference_layers import Product, packs
from replknet.kernels.onednn import computes_bfloat16, packs_matrices


def without(monkeypatch, *missing):
    """torch.ops.mkldnn without these ops, as a torch without oneDNN or a later one has it."""
    names = {"_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"} - set(missing)
    monkeypatch.setattr(
        torch.ops, "mkldnn", SimpleNamespace(**{name: getattr(torch.ops.mkldnn, name) for name in names})
    )


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
def test_torch_with_onednn_packs_and_says_what_it_computes():
    assert packs_matrices()
    assert computes_bfloat16() in (True, False)


@needs_onednn
@pytest.mark.parametrize("name", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_an_op_products_are_torchs_own(name, monkeypatch):
    weight, bias, rows = torch.randn(5, 7), torch.randn(5), torch.randn(11, 7)
    packed = Product(weight, bias, 11)
    without(monkeypatch, name)
    assert not packs_matrices()
    plain = Product(weight, bias, 11)
    assert packed.packed
    assert not plain.packed
    torch.testing.assert_close(plain(rows, "relu"), torch.nn.functional.linear(rows, weight, bias).relu())


@needs_onednn
def test_without_an_answer_bfloat16_is_not_packed(monkeypatch):
    without(monkeypatch, "_is_mkldnn_bf16_supported")
    assert computes_bfloat16() is None
    assert packs(torch.zeros(1))
    assert not packs(torch.zeros(1, dtype=torch.bfloat16))


@needs_onednn
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limit is one of x86")
def test_a_processor_that_is_limited_to_sse_has_no_bfloat16():
    script = "from replknet.kernels.onednn import computes_bfloat16; print(computes_bfloat16())"
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41"}
    run = subprocess.run([sys.executable, "-c", script], env=limited, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
