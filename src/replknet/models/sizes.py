"""What a description in a file may ask for: checks of pixels, names of classes, and layers of a network."""

from collections.abc import Iterator, Mapping
from typing import Any

from replknet import limits
from replknet.shown import shown


def check_pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise a ValueError unless mean and std have one number for each channel, and std is positive."""
    if len(mean) != len(std) or not mean or len(mean) > limits.CHANNELS or min(std) <= 0:
        raise ValueError(
            f"mean and std must have a number for each channel, and std must be positive, got {mean[:4]} and {std[:4]}"
        )


def check_classes(names: tuple[str, ...]) -> None:
    """Raise a ValueError if a file names more classes, or longer names, than `replknet.limits` allows."""
    limits.check(len(names), limits.CLASSES, "classes")
    limits.check(max(map(len, names), default=0), limits.NAME, "letters in the name of a class")


def check_config(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError if a file asks for more layers or wider ones than `replknet.limits` allows.

    Args:
        fields: options of a network, as timm.create_model takes them, or fields of its configuration.
    """
    for name, value in fields.items():
        most = next((limit for part, limit in _SIZES if part in name), limits.CHANNELS)
        numbers = [abs(number) for number in _numbers(value)]
        limits.check(len(numbers), limits.BLOCKS, f"values of {shown(name)[:40]}")
        # stages add up
        found = sum(numbers) if most == limits.BLOCKS else max(numbers, default=0)
        limits.check(found, most, f"in {shown(name)[:40]}")


# part of an option's name -> largest value; others are channels, or smaller
_SIZES = (
    ("kernel", limits.KERNEL),
    ("depth", limits.BLOCKS),
    ("layers", limits.BLOCKS),
    ("blocks", limits.BLOCKS),
    ("ratio", 100),
    ("width", 100),
)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, to any depth."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
