"""The checks on a GPU, where there is none."""

import torch

from replknet.bench import gpu


def test_without_a_cuda_device_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert capsys.readouterr().err == "no CUDA device: nothing was checked\n"
