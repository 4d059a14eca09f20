"""Backbones of segmentation networks and detectors, and their start from the weights of a classifier."""

from pathlib import Path

import torch
from torch import nn

from replknet.models import CheckpointError, read_state_dict
from replknet.models.checkpoints import mismatch
from replknet.models.model_files import weights_file
from replknet.models.timm_model import StagedNet

# prefixes of the keys after a classifier's last stage
_ENDS = ("norm.", "conv_head.", "head.")


def backbone_of(model: nn.Module, name: str) -> StagedNet:
    """The network of replknet's inside a segmentation network or detector; timm keeps it as one module.

    Raises:
        ValueError: there is none; the error calls the network `name`.
    """
    found = next((module for module in model.modules() if isinstance(module, StagedNet)), None)
    if found is None:
        raise ValueError(f"model must be one of replknet's, got {name!r}; `replknet info` lists them")
    return found


def load_backbone(backbone: StagedNet, path: str | Path) -> None:
    """Load a classifier's weights into a backbone: strict, except for layers after the classifier's last stage.

    Norms of the features keep their initial values if the classifier lacks them, as in the paper's XL.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file belongs to another network.
    """
    state = {k: v for k, v in read_state_dict(weights_file(path)).items() if not k.startswith(_ENDS)}
    own = backbone.state_dict()
    state |= {key: own[key] for key in own if key not in state and key.split(".")[2:3] == ["norm"]}
    wrong = mismatch(state, backbone)
    if wrong:
        raise CheckpointError(f"{path} does not fit the backbone {type(backbone).__name__}: {wrong}")
    with torch.no_grad():
        backbone.load_state_dict(state)
