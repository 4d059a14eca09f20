"""Which network of others a file of weights is of, by its keys; for errors that say so."""

import re
from collections.abc import Iterable

# regular expression of a key that only these networks have -> their name; the first that fits is taken
_SIGNS = (
    (r"(.*\.)?dwconv\.(lk_origin|origin_bn|dil_conv_k\d+_\d+)\..*|(.*\.)?se\.down\.weight", "UniRepLKNet"),
    (r"(.*\.)?large_kernel\.LoRA\d\..*|stages\.\d+\.\d+\.large_kernel\..*", "SLaK"),
    (r"(.*\.)?relative_position_bias_table|(.*\.)?layers\.\d+\.blocks\.\d+\.attn\..*", "a Swin Transformer"),
    (r"(.*\.)?(cls_token|pos_embed)|(.*\.)?(blocks|layer)\.\d+\.(attn|attention)\..*", "a vision transformer (ViT)"),
    (r"(.*\.)?stages\.\d+\.\d+\.(dwconv|pwconv1)\..*|(.*\.)?stages\.\d+\.blocks\.\d+\.conv_dw\..*", "ConvNeXt"),
    (r"(.*\.)?layer[1-4]\.\d+\.(conv|bn)\d\..*", "ResNet"),
    (r"(.*\.)?(features|blocks)\.\d+\.(\d+\.)?(conv|conv_pw|conv_dw|bn1|bn2)\..*", "MobileNet or EfficientNet"),
)


def looks_like(keys: Iterable[str]) -> str | None:
    """The network of others that keys look like, or None.

    Args:
        keys: keys of a state dict, in any format.
    """
    # published files have a few thousand keys; one of the first is enough
    known = [key for _, key in zip(range(2_000), keys, strict=False) if len(key) < 200]
    return next((name for sign, name in _SIGNS if any(re.fullmatch(sign, key) for key in known)), None)


def hint(keys: Iterable[str]) -> str:
    """The end of an error about a file that holds another network; empty if it looks like none that is known."""
    found = looks_like(keys)
    return "" if found is None else f"; its keys look like {found}, which replknet cannot load"
