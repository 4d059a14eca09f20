"""The RepLKNet in published weights of a segmentation network or detector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor

from replknet import limits
from replknet.models.model_files import config_of, named, statistics_of
from replknet.models.sizes import check_config
from replknet.shown import shown

# options of timm.create_model that fetch or read further files
_FETCHING = ("pretrained", "checkpoint_path", "cache_dir")


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


def check_backbone(name: str, network: Mapping[str, Any]) -> None:
    """Refuse a backbone from a file that is no plain network, or that would fetch or read further files.

    Args:
        name: timm's name of the backbone.
        network: its options.

    Raises:
        ValueError: timm knows no such network, an option is refused, or a size is beyond `replknet.limits`.
    """
    # timm also takes names such as hf-hub:OWNER/MODEL, and downloads them
    if ":" in name or "/" in name or not timm.is_model(name):
        raise ValueError(f"no network of timm's is called {shown(name)[:80]}")
    refused = [option for option in network if option.startswith(_FETCHING)]
    if refused:
        raise ValueError(f"a file of weights must not set {shown(refused[0])[:40]}, which fetches other files")
    check_config(network)


def check_sizes(*sizes: int | None) -> None:
    """Raise a ValueError if a file asks for sides of images, or channels of a head, that are not positive or too large.

    Args:
        sizes: pixels or channels; None for one that the file does not set.
    """
    for size in sizes:
        if size is not None and size < 1:
            raise ValueError(f"sides and channels must be positive, got {size}")
        limits.check(size or 1, limits.SIDE, "pixels a side, or channels of a head")
