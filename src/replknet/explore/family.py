"""Parameters and multiply-adds of the paper's networks with different kernel sizes, counted exactly."""

from functools import partial
from pathlib import Path

import timm
import torch

from replknet.analysis import cost
from replknet.explore.experiment import Arm, Claim, Column, Experiment, Figures, Finding, Results, Scale, Site
from replknet.nn import merge

_NETWORKS = {
    "3-3-3-3": "replknet_b_k3",
    "7-7-7-7": "replknet_b_k7",
    "13-13-13-13": "replknet_b_k13",
    "25-25-25-13": "replknet_b_k25",
    "31-29-27-13": "replknet_31b",
}
# the paper's figures with ImageNet's classifier at 224 pixels: parameters in M, multiply-adds in G
_PARAMETERS = {"3-3-3-3": 71.8, "7-7-7-7": 72.2, "13-13-13-13": 73.7}
_MULTIPLY_ADDS = {"3-3-3-3": 12.9, "7-7-7-7": 13.1, "13-13-13-13": 13.4}
# the paper's figures with UperNet on ADE20K, 2048x512 pixels
_UPERNET_PARAMETERS = {"3-3-3-3": 104.1, "7-7-7-7": 104.6, "13-13-13-13": 106.0}
_UPERNET_MULTIPLY_ADDS = {"3-3-3-3": 1119.0, "7-7-7-7": 1123.0, "13-13-13-13": 1130.0}


def family(scale: Scale) -> Experiment:
    """The sizes in Table 5 of the paper; every scale has the same arms."""
    return Experiment(
        name="family",
        title="What larger kernels cost: parameters and multiply-adds of the full-size family",
        question="How much larger does a network become with larger kernels?",
        scale="The paper's networks at full size, their branches merged and their norms not folded, as the paper "
        "counts, without running them; UperNet with the 150 classes of ADE20K and without its auxiliary head, on "
        "512x2048 pixels. Kernels are counted with their padding.",
        arms=tuple(_arm(kernels, model) for kernels, model in _NETWORKS.items()),
        columns=(
            Column(figure="parameters", title="parameters, M", scale=1e-6, paper=_PARAMETERS),
            Column(figure="multiply_adds", title="multiply-adds at 224, G", scale=1e-9, paper=_MULTIPLY_ADDS),
            Column(figure="upernet_parameters", title="with UperNet, M", scale=1e-6, paper=_UPERNET_PARAMETERS),
            Column(figure="upernet_multiply_adds", title="with UperNet, G", scale=1e-9, paper=_UPERNET_MULTIPLY_ADDS),
        ),
        claims=(
            _growth("parameters", "upernet_parameters", 5.3),
            _growth("multiply-adds", "upernet_multiply_adds", 3.5),
        ),
    )


def _arm(kernels: str, model: str) -> Arm:
    return Arm(
        name=kernels,
        configuration={"counted": model, "form": "merged"},
        run=partial(_count, model),
        seconds=lambda site: 10.0,
    )


def _count(model: str, seed: int, folder: Path, site: Site) -> Figures:
    from replknet.tasks.segmentation.heads import UperNet, without_auxiliary  # its packages are optional

    with torch.device("meta"):
        alone = cost(merge(timm.create_model(model), fold_bn=False), 224)
        backbone = timm.create_model(model, features_only=True)
        dense = cost(merge(without_auxiliary(UperNet(backbone, 150)), fold_bn=False), (512, 2048))
    return {
        "parameters": alone.parameters,
        "multiply_adds": alone.multiply_adds,
        "upernet_parameters": dense.parameters,
        "upernet_multiply_adds": dense.multiply_adds,
    }


def _growth(what: str, figure: str, paper: float) -> Claim:
    def ours(results: Results) -> Finding | None:
        small, large = results.values("13-13-13-13", figure), results.values("31-29-27-13", figure)
        if not small or not large:
            return None
        found = 100 * (large[0] / small[0] - 1)
        unit, digits = (1e6, "M") if "parameters" in figure else (1e9, "G")
        text = f"+{found:.2f} %, from {small[0] / unit:.2f} to {large[0] / unit:.2f} {digits}"
        return Finding(text, "agrees" if abs(found - paper) < 0.5 else "does not agree")

    return Claim(
        text=f"31-29-27-13 has a few percent more {what} than 13-13-13-13, with UperNet",
        paper=f"+{paper} % (section 4 and Table 5)",
        ours=ours,
    )
