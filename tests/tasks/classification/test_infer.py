"""Scores and predictions on a network whose logits are its input."""

import pytest
import timm
import torch
from torch import nn

import replknet  # noqa: F401  # registers the networks
from replknet.tasks.classification.infer import Guess, evaluate, predict
from replknet.train.optimisers import _no_inner_matrices

LOGITS = nn.Flatten()  # images [N,classes,1,1] are taken for the logits


def images(labels, classes):
    return 5.0 * nn.functional.one_hot(torch.tensor(labels), classes)[:, :, None, None]


def test_scores_are_counted():
    scores = evaluate(LOGITS, [(images([0, 1], 3), torch.tensor([0, 1])), (images([2], 3), torch.tensor([1]))])
    assert (scores.images, scores.top1, scores.top5) == (3, pytest.approx(2 / 3), None)
    assert scores.confusion == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert scores.per_class == [1.0, 0.5, 0.0]
    falling = torch.arange(6.0, 0.0, -1.0)[None, :, None, None]
    tops = [evaluate(LOGITS, [(falling, torch.tensor([label]))]).top5 for label in range(6)]
    assert tops == [1, 1, 1, 1, 1, 0]


def test_evaluation_errors():
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(LOGITS, [])
    with pytest.raises(ValueError, match="the data set has a class 3, the network has 3 outputs"):
        evaluate(LOGITS, [(images([0], 3), torch.tensor([3]))])


def test_predictions_are_named_and_sorted():
    x = torch.tensor([0.0, 2.0, 1.0])[None, :, None, None]
    (guesses,) = predict(LOGITS, x, ("cat", "dog", "owl"), top=2)
    assert [guess.name for guess in guesses] == ["dog", "owl"]
    assert predict(LOGITS, x, top=9)[0][2] == Guess(0, "0", pytest.approx(0.0900, abs=1e-4))
    with pytest.raises(ValueError, match="top must be positive, got 0"):
        predict(LOGITS, x, top=0)


def test_muon_moves_the_matrices_inside_the_network_alone():
    model = timm.create_model("replknet_test")
    fallback = _no_inner_matrices(model)
    inner = {name for name, _ in model.named_parameters()} - set(fallback)
    assert {name.rsplit(".", 2)[0].split(".")[-1] for name in inner} == {"2", "0", "pw1", "pw2"}
    for name in inner:
        assert model.get_parameter(name).shape[2:] == (1, 1)
    assert {"stem.0.conv.weight", "head.weight", "stages.0.blocks.0.large_kernel.lkb_origin.conv.weight"} < set(
        fallback
    )
    optimiser = timm.optim.create_optimizer_v2(model, "nmuon", lr=1e-3, fallback_list=fallback)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if optimiser.state[p]["use_muon"]}
    assert moved == inner
