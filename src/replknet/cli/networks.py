"""Networks that commands look at: files, weights that come with the package, and timm's models by their names."""

import difflib

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, resolve_model_input_args
from torch import nn

from replknet.models import shipped
from replknet.models.model_files import weights_file

# of all random weights
SEED = 0


def is_checkpoint(word: str) -> bool:
    """Whether it names a file, or weights that come with the package."""
    try:
        weights_file(word)
    except FileNotFoundError:
        return False
    return True


def of_timm(name: str, pretrained: bool, way_out: str, size: int | None = None) -> nn.Module:
    """A model of timm's; random weights are the same in every call.

    Args:
        name: with a tag or without.
        pretrained: with its trained weights.
        way_out: end of the error.
        size: side of the images that it is built for, where it is built for one; None for its own.

    Raises:
        ValueError: there is no such model, its weights cannot be had, or it is not for that size.
    """
    if name not in timm_names(name):
        raise ValueError(unknown(name))
    torch.manual_seed(SEED)
    sides = None if size is None else (size, size)
    try:
        options = {"model_name": name} if sides is None else resolve_model_input_args(name, {"img_size": sides})
        return timm.create_model(**options, pretrained=pretrained)
    except (RuntimeError, OSError, TypeError, AssertionError) as error:
        # no weights, no server, or a size that the constructor does not take
        what = " with its trained weights" if pretrained else ""
        images = "" if size is None else f" for {size}x{size} images"
        raise ValueError(f"timm cannot build {name}{what}{images}: {error}; {way_out}") from error


def timm_names(word: str) -> list[str]:
    """Names under which timm has this architecture: without a tag, and with each that it knows."""
    architecture = word.partition(".")[0]
    return [architecture, *get_arch_pretrained_cfgs(architecture)] if timm.is_model(architecture) else []


def unknown(word: str) -> str:
    """What to say of a word that names no network."""
    nearest = difflib.get_close_matches(word, [*shipped(), *timm_names(word)[1:], *timm.list_models()], 3)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "timm.list_models() names those"
    return (
        f"{word} is no checkpoint file, none of the weights that come with replknet ({', '.join(shipped())}) and no "
        f"model of timm's; {hint}"
    )
