"""The card in an exported file: JSON that says how the file is used, checked before anything is made of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from replknet import limits
from replknet.models.model_files import as_tuples
from replknet.reading import Kind, reading
from replknet.shown import shown
from replknet.typed import typed

Card = TypeVar("Card")
# what the card is called in a file
KEY = "replknet"
# largest side of an image that a file takes, pixels
LARGEST_SIDE = 8192


class ExportedError(ValueError):
    """A file for another runtime is damaged, asks for too much, or is a program that nobody trusts."""


_KIND = Kind(ExportedError, "a card of replknet's", "export it again with `replknet export`")


def found_in(text: str | None, path: Path) -> str:
    """The text of a card, or an ExportedError if a file has none."""
    if text is None:
        raise ExportedError(
            f"{shown(path)} says nothing about its classes and images: expected a file that `replknet export` wrote"
        )
    return text


def card_of_text(text: str, path: Path) -> dict[str, Any]:
    """The fields of a card, with lists as tuples.

    Args:
        text: the card as JSON.
        path: what the errors call the file.

    Raises:
        ExportedError: it is no object of JSON with finite numbers.
    """
    with reading(path, _KIND):
        limits.check(len(text), limits.LIST, "letters in a card")
        card = json.loads(text, parse_constant=_no_number)
        if not isinstance(card, dict):
            raise ValueError(f"it must be an object, got {shown(text)[:40]}")
        head = typed(_Head, {name: value for name, value in card.items() if name in ("task", "sides")}, "the card")
        check_sides(head.get("sides", (1, 1)))
        return {**{name: as_tuples(value) for name, value in card.items()}, **head}


@dataclass(frozen=True)
class _Head:
    """What is used of a card before a task makes its own record of it; of a field that is missing, nothing."""

    task: str = ""
    sides: tuple[int, int] = (1, 1)


def parsed_card(kind: type[Card], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file as a task's own record.

    Args:
        kind: the record, a dataclass. Each field has the type that its hint says; what its values may be is checked by
            the record itself.
        card: fields of `card_of_text`.
        path: what the errors call the file.

    Raises:
        ExportedError: the card has other fields, or values of another type or size.
    """
    with reading(path, _KIND):
        return kind(**typed(kind, card, "the card"))


def described_card(kind: type[Card], description: type[Any], card: Mapping[str, Any], path: Path) -> Card:
    """The card of a file that also has the fields of a description; see `plain_card` and `parsed_card`."""
    theirs = {field.name for field in fields(description)}
    inner = parsed_card(description, {name: value for name, value in card.items() if name in theirs}, path)
    outer = {name: value for name, value in card.items() if name not in theirs}
    return parsed_card(kind, {"description": inner, **outer}, path)


def plain_card(card: Any) -> dict[str, Any]:
    """A card with a description as one object for a file: the description's fields become fields of the card."""
    values = asdict(card)
    return {**values.pop("description"), **values}


def check_sides(sides: tuple[int, int]) -> None:
    """Refuse a range of sides that no image can have, or larger than `replknet.limits` allows.

    Args:
        sides: smallest and largest side, pixels.

    Raises:
        ValueError: it is no such range.
    """
    smallest, largest = sides
    if not 1 <= smallest <= largest:
        raise ValueError(f"its images have sides from {smallest} to {largest} pixels, which is no range")
    limits.check(largest, limits.SIDE, "pixels in the side of an image")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
