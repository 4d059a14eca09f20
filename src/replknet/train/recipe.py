"""What a training is: everything that decides its result, in one frozen record.

A recipe has the fields that all trainings share, and the options of its task. `replknet.tasks` says which task they
belong to; the options of a task are in its `recipes.py`.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol


class Options(Protocol):
    """What a task adds to a recipe: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    # name of the task
    task: ClassVar[str]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in training, pixels; the largest where sizes differ."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training.

    Args:
        model: timm's name of the network; in segmentation and detection of the backbone.
        weights: a classifier's checkpoint to start from, of any known key format, or the name of weights that come
            with the package. A classifier of other classes is left out.
        finetune: whether the training makes no sense without `weights`.
        kernels: side of the large kernel of each stage in pixels, odd; None for the network's own.
        network: other options of the network by name, as timm.create_model takes them, such as {"shortcut": false}.
        normalization: mean and std of the pixels: "imagenet", "inception" for 0.5 and 0.5, or "cifar10".
        evaluate: score the validation images; without it no validation images are needed.
        evaluate_every: epochs from one score to the next.
        epochs: passes over the training images.
        samples: images in training, in place of epochs; rounded to whole passes over the images.
        warmup_epochs: epochs of warm-up, whole or not.
        warmup_samples: images of warm-up, in a recipe that counts samples.
        batch_size: images a step, over all devices.
        optimizer: timm's name of the optimiser. Those with a fallback, such as nmuon (Muon with Nesterov momentum),
            move the matrices of the 1x1 convolutions. AdamW moves depthwise kernels, stem, classifier, norms, biases.
        lr: peak learning rate.
        weight_decay: decay of weights; biases and norms are exempt.
        drop_path: rate of dropped residual branches in the last block.
        sync_bn: batch norms take the statistics of all processes; on GPUs only, as torch has it.
        clip_grad: largest L2 norm of the gradients, or None.
        precision: Lightning's name: "32-true", "bf16-mixed" or "16-mixed".
        workers: processes that load images.
        seed: of all random numbers.
        options: the fields of the task.

    Raises:
        ValueError: a value is out of its range, or the length is given in both units or in none.
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
        """Passes over a training set of so many images."""
        if self.samples is None:
            assert self.epochs is not None
            return self.epochs
        return max(1, round(self.samples / images))

    def changed(self, **changes: Any) -> "Recipe":
        """A copy with other values, of the recipe's own fields or of its options.

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
        """Every field that counts in one dict, as JSON gives it back; without the length in the other unit."""
        values = asdict(self)
        values |= values.pop("options")
        other = "samples" if self.samples is None else "epochs"
        for name in (other, f"warmup_{other}"):
            del values[name]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each field that has one, as JSON gives it back: records of earlier versions lack some."""
        found = {
            field.name: field.default
            for kind in (type(self), type(self.options))
            for field in fields(kind)
            if field.default is not MISSING
        }
        defaults: dict[str, Any] = json.loads(json.dumps(found))
        return defaults


def check_positive(record: object, *names: str) -> None:
    """Raise a ValueError where one of these fields is not positive."""
    for name in names:
        if getattr(record, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(record, name)}")


def check_not_negative(record: object, *names: str) -> None:
    """Raise a ValueError where one of these fields is negative."""
    for name in names:
        if getattr(record, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(record, name)}")


def check_below_one(record: object, *names: str) -> None:
    """Raise a ValueError where one of these fields is negative, or 1 or more."""
    for name in names:
        if not 0 <= getattr(record, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(record, name)}")


def check_share(record: object, *names: str) -> None:
    """Raise a ValueError where one of these fields is not from 0 to 1."""
    for name in names:
        if not 0 <= getattr(record, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {getattr(record, name)}")
