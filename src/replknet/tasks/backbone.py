"""The RepLKNet in published weights of a segmentation network or detector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from replknet.models.model_files import config_of, named, statistics_of


@dataclass(frozen=True)
class OfficialBackbone:
    """A backbone that was recognised by keys and shapes.

    Args:
        name: timm's name of the backbone.
        network: options of the backbone, as timm.create_model takes them.
        channels: channels of each stage.
        mean: mean of each channel in RGB, for values from 0 to 1.
        std: standard deviation of each channel in RGB, for values from 0 to 1.
    """

    name: str
    network: dict[str, Any]
    channels: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def official_backbone(state: Mapping[str, Tensor], prefix: str, where: str) -> OfficialBackbone | None:
    """The backbone in a state dict; None if no key begins with the prefix.

    Args:
        state: tensors under our keys.
        prefix: prefix of the backbone's keys.
        where: what the error calls the state.

    Raises:
        CheckpointError: the backbone is no RepLKNet.
    """
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not own:
        return None
    config = config_of(own, where)
    name, network = named(config)
    if any(key.startswith("stages.0.norm.") for key in own):
        network["norm_intermediate_features"] = True
    mean, std = statistics_of(config)
    return OfficialBackbone(name, network, tuple(config.channels), mean, std)
