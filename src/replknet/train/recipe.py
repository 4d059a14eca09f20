"""A recipe: one frozen record of everything that decides the result of a training.

A recipe has the fields that all trainings share, and the options of its task. Each task defines its options in its
`recipes.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from replknet import limits

# largest number in a recipe: no training has as many images
_LARGEST = 10**12
# seeds of numpy have 32 bits
_SEED = 2**32 - 1
# processes that load images: no machine has as many processors
_WORKERS = 1_024


class RecipeError(ValueError):
    """A value of a recipe that a library does not take. The text says which, why, and what to do."""


class Options(Protocol):
    """The fields that a task adds to a recipe: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    # name of the task
    task: ClassVar[str]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in training, pixels; the largest if sizes differ."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training.

    Args:
        model: timm's name of the network; for segmentation and detection the name of the backbone.
        weights: checkpoint of a classifier to start from, in any known key format, or the name of weights that come
            with the package. Its last layer is used only if the number of classes is equal.
        finetune: whether the recipe needs `weights` to start from.
        kernels: sides of the large kernels, one for each stage, pixels, odd; None: the network's own sides.
        network: further options of the network for timm.create_model, such as {"shortcut": false}.
        normalization: mean and std of the pixels: "imagenet", "cifar10", or "inception" (0.5 and 0.5).
        evaluate: score the validation images; false needs no validation images.
        evaluate_every: number of epochs from one score to the next; the last epoch is always scored.
        epochs: number of passes over the training images.
        samples: number of images to train on, instead of epochs; rounded to whole passes.
        warmup_epochs: number of epochs of warm-up; it may be a fraction.
        warmup_samples: number of images of warm-up, in a recipe that counts samples.
        batch_size: number of images in a step, over all devices.
        optimizer: timm's name of the optimiser. For classifiers, Muon and its variants, such as nmuon (with Nesterov
            momentum), update the 1x1 convolutions. AdamW then updates everything else.
        lr: peak learning rate.
        weight_decay: weight decay; biases and norms are exempt.
        drop_path: rate of dropped residual branches in the last block; the rate grows linearly from 0 in the first.
        sync_bn: compute the statistics of batch norms over all processes; only on GPUs.
        clip_grad: largest L2 norm of the gradients; None: no limit.
        precision: precision of the training, with Lightning's names: "32-true", "bf16-mixed" or "16-mixed".
        workers: number of processes that load images; 0: the training loads them itself.
        seed: seed of all random numbers.
        options: the fields of the task.

    Raises:
        ValueError: a value is out of its range, or not exactly one of `epochs` and `samples` is given.
    """

    model: str
    weights: str | None = None
    finetune: bool = False
    kernels: tuple[int, ...] | None = None
    network: dict[str, Any] | None = None
    normalization: Literal["imagenet", "inception", "cifar10"] = "imagenet"
    evaluate: bool = True
    evaluate_every: int = 1
    epochs: int | None = None
    samples: int | None = None
    warmup_epochs: float = 0
    warmup_samples: int = 0
    batch_size: int
    optimizer: str = "adamw"
    lr: float
    weight_decay: float = 0.05
    drop_path: float = 0.0
    sync_bn: bool = False
    clip_grad: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    workers: int = 1
    seed: int = 0
    options: Options

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.samples is None):
            raise ValueError(f"give either epochs or samples, got {self.epochs} and {self.samples}")
        unit, other = ("epochs", "samples") if self.samples is None else ("samples", "epochs")
        check_positive(self, "evaluate_every", unit, "batch_size", "lr")
        check_at_most(self, _SEED, "seed")
        check_at_most(self, _WORKERS, "workers")
        check_not_negative(self, "seed")
        if self.clip_grad is not None:
            check_positive(self, "clip_grad")
        if any(side < 1 or side % 2 == 0 for side in self.kernels or ()):
            raise ValueError(f"kernels must be positive and odd, got {list(self.kernels or ())}")
        check_not_negative(self, f"warmup_{unit}", "weight_decay", "workers")
        check_below_one(self, "drop_path")
        length, warmup = getattr(self, unit), getattr(self, f"warmup_{unit}")
        if warmup >= length:
            raise ValueError(f"warmup_{unit} must be below the {length} {unit}, got {warmup}")
        if getattr(self, f"warmup_{other}"):
            raise ValueError(f"this recipe counts {unit}: give warmup_{unit}, not warmup_{other}")

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.options.task

    def epochs_of(self, images: int) -> int:
        """Number of passes over a training set with this number of images."""
        if self.samples is None:
            assert self.epochs is not None
            return self.epochs
        return max(1, round(self.samples / images))

    def changed(self, **changes: Any) -> "Recipe":
        """A copy with other values for fields of the recipe or of its options.

        Raises:
            ValueError: a value is out of its range.
            TypeError: there is no such field.
        """
        ours = {field.name for field in fields(self)}
        theirs = {name: changes.pop(name) for name in list(changes) if name not in ours}
        if theirs:
            changes["options"] = replace(self.options, **theirs)
        return replace(self, **changes)

    @property
    def plain(self) -> dict[str, Any]:
        """All fields in one dict, with JSON's types. The unused one of `epochs` and `samples` is left out."""
        values = asdict(self)
        values |= values.pop("options")
        other = "samples" if self.samples is None else "epochs"
        for name in (other, f"warmup_{other}"):
            del values[name]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each field that has one, with JSON's types. Records of earlier versions lack newer fields."""
        found = {
            field.name: field.default
            for kind in (type(self), type(self.options))
            for field in fields(kind)
            if field.default is not MISSING
        }
        defaults: dict[str, Any] = json.loads(json.dumps(found))
        return defaults


def check_positive(record: object, *names: str) -> None:
    """Raise a ValueError if one of these fields is not positive."""
    for name in names:
        if not 0 < getattr(record, name) <= _LARGEST:
            raise ValueError(f"{name} must be positive{_finite(record, name)}, got {getattr(record, name)}")


def check_not_negative(record: object, *names: str) -> None:
    """Raise a ValueError if one of these fields is negative."""
    for name in names:
        if not 0 <= getattr(record, name) <= _LARGEST:
            raise ValueError(f"{name} must not be negative{_finite(record, name)}, got {getattr(record, name)}")


def check_at_most(record: object, most: int, *names: str) -> None:
    """Raise a ValueError if one of these fields is larger than `most`; None is not."""
    for name in names:
        value = getattr(record, name)
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def check_sides(record: object, *names: str) -> None:
    """Raise a ValueError if a side in one of these fields is not from 1 to `limits.SIDE` pixels.

    Args:
        record: has the fields.
        names: fields with a number, tuples of numbers, or None for no side.
    """
    most = int(limits.SIDE * limits.factor())
    for name in names:
        value = getattr(record, name)
        if any(not 1 <= side <= most for side in _numbers(value)):
            raise ValueError(f"{name} must be from 1 to {most} pixels, got {value}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in nested tuples."""
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif value is not None:
        yield value


def _finite(record: object, name: str) -> str:
    return f", and at most {_LARGEST:.0e}" if getattr(record, name) > _LARGEST else ""


def check_below_one(record: object, *names: str) -> None:
    """Raise a ValueError if one of these fields is negative, or 1 or more."""
    for name in names:
        if not 0 <= getattr(record, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(record, name)}")


def check_share(record: object, *names: str) -> None:
    """Raise a ValueError if one of these fields is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(record, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {getattr(record, name)}")
