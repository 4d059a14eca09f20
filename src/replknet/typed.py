"""Values from JSON files, checked against the types of a dataclass."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from replknet.shown import shown

# letters of a wrong value that an error quotes
_QUOTED = 60


def typed(kind: type[Any], fields: Mapping[str, Any], where: str = "the record") -> dict[str, Any]:
    """The fields of a dataclass with values from JSON; lists become tuples where the dataclass has tuples.

    Args:
        kind: the dataclass.
        fields: name -> value, as `json.loads` returns them. A field that is a dataclass itself may be built already.
        where: what an error calls them.

    Returns:
        The same names, in the same order.

    Raises:
        ValueError: a name is unknown, a field without a default is missing, or a value has another type. A number
            must be finite. The text says what was expected and what came.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown field {shown(unknown[0])[:_QUOTED]}; known are {', '.join(known)}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the field {name}")
    return {name: _value(hints[name], value, f"{name} in {where}") for name, value in fields.items()}


def _value(hint: Any, value: Any, name: str) -> Any:
    for part in _parts(hint):
        try:
            return _of(part, value)
        except TypeError:
            continue
    raise ValueError(f"{name} must be {words(hint)}, got {shown(repr(value))[:_QUOTED]}")


def _of(hint: Any, value: Any) -> Any:
    """The value as one type, which is no union; a TypeError if it is another."""
    if hint is Any:
        return value
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in members)
    elif origin is tuple:
        return _tuple(members, value)
    elif origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {_of(members[0], key): _any_of(members[1], one) for key, one in value.items()}
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, hint)
    if not fits:
        raise TypeError
    return value


def _tuple(members: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_any_of(members[0], one) for one in value)
    if len(value) != len(members):
        raise TypeError
    return tuple(_any_of(member, one) for member, one in zip(members, value, strict=True))


def _any_of(hint: Any, value: Any) -> Any:
    for part in _parts(hint):
        try:
            return _of(part, value)
        except TypeError:
            continue
    raise TypeError


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # a whole number beyond the largest float
        return False


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; for any other type the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def words(hint: Any) -> str:
    """A type in plain words, such as "a list of whole numbers".

    Args:
        hint: a type that JSON can hold, or a union of such types.
    """
    return " or ".join(dict.fromkeys(_words(part) for part in _parts(hint)))


def _words(hint: Any) -> str:
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin is tuple:
        count = "" if members[-1] is Ellipsis else f"{len(members)} "
        return f"a list of {count}{_PLURALS.get(members[0], 'lists')}"
    if origin is dict:
        return "an object"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}.get(
        hint, hint.__name__
    )


_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "truth values"}
