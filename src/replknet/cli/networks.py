"""Networks for commands: files, weights that come with the package, and timm's models by name."""

import difflib

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, resolve_model_input_args
from torch import nn

from replknet.models import shipped
from replknet.models.model_files import weights_file

# seed of all random weights
SEED = 0


def is_checkpoint(word: str) -> bool:
    """Whether the word names a file, or weights that come with the package."""
    try:
        weights_file(word)
    except FileNotFoundError:
        return False
    return True


def of_timm(name: str, pretrained: bool, way_out: str, size: int | None = None) -> nn.Module:
    """A model of timm's. Random weights are equal in every call.

    Args:
        name: name of the model, with or without a tag.
        pretrained: whether to load its trained weights.
        way_out: end of the error: what the user can do.
        size: side of the images, for models that are built for one size; None: the model's own size.

    Raises:
        ValueError: there is no such model, its weights cannot be downloaded, or it does not take the size.
    """
    if name not in timm_names(name):
        raise ValueError(unknown(name))
    torch.manual_seed(SEED)
    sides = None if size is None else (size, size)
    try:
        options = {"model_name": name} if sides is None else resolve_model_input_args(name, {"img_size": sides})
        return timm.create_model(**options, pretrained=pretrained)
    except (RuntimeError, OSError, TypeError, AssertionError) as error:
        # no trained weights, no server, or a size that the model does not take
        what = " with its trained weights" if pretrained else ""
        images = "" if size is None else f" for {size}x{size} images"
        raise ValueError(f"timm cannot build {name}{what}{images}: {error}; {way_out}") from error


def timm_names(word: str) -> list[str]:
    """Names of this architecture in timm: without a tag, and with each of its tags."""
    architecture = word.partition(".")[0]
    return [architecture, *get_arch_pretrained_cfgs(architecture)] if timm.is_model(architecture) else []


def unknown(word: str) -> str:
    """The error for a word that names no network."""
    nearest = difflib.get_close_matches(word, [*shipped(), *timm_names(word)[1:], *timm.list_models()], 3)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() names those"
    return (
        f"{word} is no checkpoint file, none of the weights that come with replknet ({', '.join(shipped())}) and no "
        f"model of timm's; {hint}"
    )
