"""One safetensors file a network: its weights, and a description of how to build and feed the network.

Files without a description, such as the released weights, are recognised by their keys and shapes.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor, nn

from replknet import limits
from replknet.models import mobilenetv2, replknet
from replknet.models.checkpoints import CheckpointError, form_of, listed, mismatch, read_metadata, read_state_dict
from replknet.models.mobilenetv2 import MobileNetV2, MobileNetV2Config
from replknet.models.replknet import RepLKNet, RepLKNetConfig
from replknet.models.sizes import check_classes, check_config, check_pixels
from replknet.models.strangers import hint
from replknet.models.timm_model import StagedNet
from replknet.nn import merge
from replknet.reading import Kind, reading
from replknet.shown import shown
from replknet.typed import typed

Network = TypeVar("Network", bound=nn.Module)
Described = TypeVar("Described")

# every network that we register with timm
NETWORKS: dict[str, RepLKNetConfig | MobileNetV2Config] = {**replknet.CONFIGS, **mobilenetv2.CONFIGS}

# key of a classifier's description in a file's header; other tasks have keys that begin like it
FIELD = "replknet"
_FAMILY: dict[type[Any], str] = {RepLKNetConfig: "replknet", MobileNetV2Config: "mobilenetv2"}
NETWORK = Kind(CheckpointError, "a network of replknet's", "load its tensors into a network with load_checkpoint")
# weights that come with the package, as MODEL.TAG.safetensors
_SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Which network a file of weights belongs to, and which images the network expects.

    Args:
        config: the architecture.
        in_chans: channels of the image.
        classes: names of the outputs; empty if unknown.
        num_classes: number of outputs.
        image_size: side of the image for evaluation, pixels.
        crop_pct: side of the centre crop divided by the side of the resized image.
        mean: mean of each channel in RGB, for values from 0 to 1.
        std: standard deviation of each channel in RGB, for values from 0 to 1.

    Raises:
        ValueError: a size is not positive, or beyond what `replknet.limits` allows; or there are not as many names as
            outputs.
    """

    config: RepLKNetConfig | MobileNetV2Config
    in_chans: int = 3
    classes: tuple[str, ...] = ()
    num_classes: int = 1000
    image_size: int = 224
    crop_pct: float = 0.875
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        check_pixels(self.mean, self.std)
        check_classes(self.classes)
        check_config(asdict(self.config))
        limits.check(self.in_chans, limits.CHANNELS, "channels of an image")
        limits.check(self.num_classes, limits.CLASSES, "classes")
        limits.check(self.image_size, limits.SIDE, "pixels a side of an image")
        if self.in_chans < 1 or self.num_classes < 0 or self.image_size < 1:
            raise ValueError(
                f"in_chans and image_size must be at least 1 and num_classes 0, got {self.in_chans}, "
                f"{self.image_size} and {self.num_classes}"
            )
        if not 0.1 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be from 0.1 to 1, got {self.crop_pct}")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} classes have names, and the network has {self.num_classes} outputs")

    @property
    def name(self) -> str:
        """The registered name of the architecture, or "custom"."""
        return next((name for name, config in NETWORKS.items() if config == self.config), "custom")

    def build(self, **options: Any) -> StagedNet:
        """A network with these inputs and outputs; `options` go to its class."""
        options |= {"num_classes": self.num_classes, "in_chans": self.in_chans}
        if isinstance(self.config, MobileNetV2Config):
            return MobileNetV2(self.config, **options)
        return RepLKNet(self.config, **options)


def save_model(model: StagedNet, path: str | Path, description: Description) -> None:
    """Write a network to a safetensors file. An existing file is replaced only after the new one is complete.

    Args:
        model: a network in any form: training, merged or folded. Tensors keep their dtype.
        path: the file; a missing folder is created.
        description: how to build the network again and how to feed it; it goes into the file's header.
    """
    write(model, path, {FIELD: json.dumps(_plain(description))})


def write(model: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write a network's tensors to a safetensors file with `metadata` in its header: completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    part = path.with_name(path.name + ".part")
    # safetensors makes files that only their owner may read: restore the usual permissions
    part.touch()
    mode = part.stat().st_mode
    save_file(state, part, metadata={"format": "pt", **metadata})
    part.chmod(mode)
    os.replace(part, path)


def _plain(description: Description) -> dict[str, Any]:
    return {"family": _FAMILY[type(description.config)], **asdict(description)}


def shipped() -> list[str]:
    """The weights that come with the package.

    Returns:
        Their names, such as replknet_cifar_l.cifar10.
    """
    return sorted(file.stem for file in _SHIPPED.glob("*.safetensors"))


def weights_file(path: str | Path) -> Path:
    """The file at `path`, or the file of weights with that name in the package; the name may lack the tag.

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(path).is_file():
        return Path(path)
    named = [name for name in shipped() if str(path) in (name, name.partition(".")[0])]
    if not named:
        raise FileNotFoundError(f"no checkpoint at {path}; weights that come with replknet: {', '.join(shipped())}")
    return _SHIPPED / f"{named[0]}.safetensors"


@dataclass(frozen=True)
class Source:
    """A file of weights that was read.

    Args:
        path: the file.
        state: its tensors under our keys.
        texts: the fields of its header; empty for files without one.
    """

    path: Path
    state: dict[str, Tensor]
    texts: dict[str, str]


def read(path: str | Path, *, average: bool = True) -> Source:
    """Read a file of weights, of any known key format, or weights that come with the package.

    Args:
        path: the file, or a name.
        average: whether to prefer the average of the weights; see `read_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds no weights.
    """
    path = weights_file(path)
    return Source(path, read_state_dict(path, average=average), read_metadata(path))


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> tuple[StagedNet, Description]:
    """The classifier of a checkpoint file, in the file's form and in eval mode, and its description.

    Args:
        path: a file that `save_model` wrote, another file that `read_state_dict` takes, or the name of weights that
            come with the package (`shipped`). Without a description, keys and shapes give the architecture, and image
            size, mean and std are the values of the paper's networks.
        dtype: dtype of the network; None for the file's dtype.

    Returns:
        The network on the CPU and its description.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file holds no classifier of replknet's.
    """
    return classifier_of(read(path), dtype)


def classifier_of(source: Source, dtype: torch.dtype | None = None) -> tuple[StagedNet, Description]:
    """The classifier of a file that was read, and its description; see `load_model`."""
    text = source.texts.get(FIELD)
    other = next((field for field in source.texts if field.startswith(f"{FIELD}_")), None)
    if text is None and other is not None:
        raise CheckpointError(
            f"{shown(source.path)} holds no classifier but a network for {listed([other.removeprefix(f'{FIELD}_')])}: "
            "replknet.load reads networks of any task"
        )
    with reading(source.path, NETWORK):
        description = described(source.state, shown(source.path)) if text is None else parsed(text, _classifier)
        options = {}
        if any(re.match(r"stages\.\d\.norm\.", key) for key in source.state):
            options["norm_intermediate_features"] = True
        with torch.device("meta"):
            model = description.build(**options)
        return filled(model, source.state, source.path, type(model).__name__).to(dtype), description


def filled(model: Network, state: Mapping[str, Tensor], where: str | Path, what: str) -> Network:
    """The network in the form of a state dict, filled with its tensors, in eval mode.

    Args:
        model: a network in the training form, on any device.
        state: tensors under our keys.
        where: what the error calls the state.
        what: what the error calls the network.

    Raises:
        CheckpointError: the state belongs to another network.
    """
    form = form_of(state)
    if form != "training":
        model = merge(model, fold_bn=form == "folded")
    wrong = mismatch(state, model)
    if wrong:
        raise CheckpointError(f"{shown(where)} holds no complete {what}: {wrong}{hint(state)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def parsed(text: str, make: Callable[..., Described]) -> Described:
    """The description in the header of a file.

    Args:
        text: JSON of its fields; lists become tuples.
        make: from the fields to the description: a dataclass, or a function that checks them itself.

    Raises:
        ValueError: it is no such description.
    """
    limits.check(len(text), 4 * limits.LIST, "letters of a description")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"the description must be an object, got {shown(repr(fields))[:40]}")
    return make(**(typed(make, fields, "the description") if is_dataclass(make) else fields))


def as_tuples(value: Any) -> Any:
    """JSON's lists as tuples, to any depth; other values as they are."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _classifier(*, config: Any = None, family: Any = "replknet", **others: Any) -> Description:
    # files of earlier versions are all of one family
    kinds = {name: kind for kind, name in _FAMILY.items()}
    if not isinstance(family, str) or family not in kinds:
        raise ValueError(f"no family is called {shown(repr(family))[:40]}; there are {', '.join(kinds)}")
    if not isinstance(config, dict):
        raise ValueError(f"the config must be an object, got {shown(repr(config))[:40]}")
    # before the configuration itself, which looks at each of its values
    check_config(config)
    architecture = kinds[family](**typed(kinds[family], config, "the config"))
    return Description(**typed(Description, {"config": architecture, **others}, "the description"))


def described(state: Mapping[str, Tensor], where: str = "the checkpoint") -> Description:
    """The description of official weights, from keys and shapes.

    Raises:
        CheckpointError: the keys do not belong to a RepLKNet classifier.
    """
    if "head.weight" not in state:
        raise CheckpointError(_no_replknet(state, where, "stem.0.conv.weight, head.weight"))
    config = config_of(state, where)
    mean, std = statistics_of(config)
    return Description(
        config=config,
        in_chans=state["stem.0.conv.weight"].shape[1],
        num_classes=state["head.weight"].shape[0],
        image_size=320 if _is_xl(config) else 224,
        mean=mean,
        std=std,
    )


def config_of(state: Mapping[str, Tensor], where: str = "the checkpoint") -> RepLKNetConfig:
    """The architecture that keys and shapes describe, with the paper's stem; `named` gives its registered name.

    Args:
        state: tensors under the official keys, with or without a classifier. If the branches are merged, the
            result has no small kernel.
        where: what the error calls the state.

    Raises:
        CheckpointError: the keys do not belong to a RepLKNet.
    """
    large = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.large_kernel\.(?:lkb_origin\.conv|lkb_reparam)\.weight")
    found = {(int(m[1]), int(m[2])): value for key, value in state.items() if (m := large.fullmatch(key))}
    if not found or "stem.0.conv.weight" not in state:
        raise CheckpointError(_no_replknet(state, where, "stem.0.conv.weight"))
    stages = sorted({stage for stage, _ in found})
    first = [found[stage, 0] for stage in stages]
    channels = [state[f"stages.{stage}.blocks.1.pw2.conv.weight"].shape[0] for stage in stages]
    hidden = state["stages.0.blocks.1.pw1.conv.weight"].shape[0]
    small = state.get("stages.0.blocks.0.large_kernel.small_conv.conv.weight")
    return RepLKNetConfig(
        kernels=tuple(weight.shape[-1] for weight in first),
        depths=tuple(sum(stage == s for s, _ in found) for stage in stages),
        channels=tuple(channels),
        small_kernel=None if small is None else small.shape[-1],
        dw_ratio=first[0].shape[0] / channels[0],
        ffn_ratio=hidden / channels[0],
    )


def _no_replknet(state: Mapping[str, Tensor], where: str, keys: str) -> str:
    return (
        f"{where} holds no RepLKNet classifier: expected keys such as {keys} and "
        f"stages.0.blocks.0.large_kernel.lkb_origin.conv.weight, got {listed(state, 4)}{hint(state)}"
    )


def named(config: RepLKNetConfig) -> tuple[str, dict[str, Any]]:
    """The registered name of an architecture, and the options for timm.create_model.

    If only the small kernel differs from a registered architecture, it is the one option. For any other unregistered
    architecture the name is replknet_31b, and every field is an option.
    """
    for name, known in replknet.CONFIGS.items():
        differing = {field: value for field, value in asdict(config).items() if value != getattr(known, field)}
        if set(differing) <= {"small_kernel"}:
            return name, differing
    return "replknet_31b", asdict(config)


def statistics_of(config: RepLKNetConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels for the released networks: ImageNet's, except for XL."""
    if _is_xl(config):
        return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def _is_xl(config: RepLKNetConfig) -> bool:
    return config.channels == replknet.CONFIGS["replknet_xl"].channels
