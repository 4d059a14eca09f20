"""Options of commands: made from dataclasses, with help in plain words and errors that say what was expected."""

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from argparse import Action
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter, set_loader

from replknet import limits
from replknet.cli.errors import UsageError
from replknet.cli.main import COMMANDS

# help of the arguments of every command that reads a network
CHECKPOINT = "file of weights, in any format that load_checkpoint reads, or name of weights in the package"
EXPORTED = f"{CHECKPOINT}; or a file that `export` wrote"
TASK = "task that the network must have; by default the file's own task"
_LIMITS = (
    "let files ask for this many times the usual sizes of networks and images, such as 4; only for files that you trust"
)

TRUST = "run the code in a .pt2 or .aoti.pt2 file, which is a program: only for files whose makers you trust"
# values are JSON; what is none is a text, also one that YAML would refuse or read as something else
_MODE = "replknet"
set_loader(_MODE, json.loads, (ValueError, RecursionError))

# an argument in a docstring, and its text
_FIELDS = r"^        (\w+): (.*(?:\n            .*)*)"
# what stands before a wrong value in the errors of jsonargparse
_CAME = (
    r"[Vv]alue: |invalid choice: |Not of type \w+: (?!invalid|could not|int\(\)|float\(\))|base 10: |to float: |"
    r"real number, not "
)
# threads of a process: no machine has as many processors
THREADS = 1_024
# letters of a wrong value that an error quotes
_QUOTED = 100
# largest number of choices that stand in the name of an option; more of them stand in its help
_LISTED = 5


class Parser(ArgumentParser):
    """A parser without abbreviations. Its errors say what was expected and name the nearest match."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, parser_mode=_MODE, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = self._value_error(message) or self._missing(message) or message + self._nearest_option(message)
        raise UsageError(self.prog, text)

    def _value_error(self, message: str) -> str | None:
        """What values the option takes, or None if the message is not about a wrong value."""
        found = re.match(r'Parser key "([^"]+)"|argument ([^:]+): invalid choice', message)
        if found is None:
            return None
        dest = (found[1] or found[2].split("/")[-1].lstrip("-")).replace("-", "_")
        action = next((action for action in self._actions if action.dest == dest), None)
        came = re.search(rf"(?:{_CAME})(.*?)(?: \(choose| does not|$)", message)
        if action is None or came is None:
            return None
        value = came[1].strip("'")
        value = value if len(value) <= _QUOTED else f"{value[:_QUOTED]}..."
        name = action.option_strings[-1] if action.option_strings else action.dest
        return f"{name} takes {_expected(action)}, got {value}{_nearest(value, _choices(action))}"

    def _missing(self, message: str) -> str | None:
        """The names of the options that are missing, or None if the message is not about these."""
        start, found, names = message.partition("arguments are required: ")
        if not found:
            return None
        options = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
        return f"{start}{found}{', '.join(options.get(name, name) for name in names.split(', '))}"

    def _nearest_option(self, message: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.replace("=", " ").replace(":", " ").split():
            nearest = difflib.get_close_matches(word, known, 1)
            if word.startswith("--") and word not in known and nearest:
                return f"; did you mean {nearest[0]}?"
        return ""


def parser(name: str, example: str, part: str = "", description: str = "", files: bool = True) -> Parser:
    """The parser of a command, with an example below its help.

    Args:
        name: name of the command.
        example: example of a call.
        part: part of the command, such as erf of analyze; empty: the whole command.
        description: what the part does; empty: what the command does.
        files: whether it reads files of users, so that there are limits to what these may ask for.
    """
    prog = f"replknet {name} {part}".strip()
    p = Parser(prog=prog, description=description or COMMANDS[name], epilog=f"example: {example}")
    if files:
        group = p.add_argument_group("files of others")
        group.add_argument("--limits", action=_Limits, type=str, default=SUPPRESS, metavar="X", help=_LIMITS)
    return p


class _Limits(Action):
    """Sets the environment variable, so that processes that this one starts have the limits, too."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        os.environ[limits.VARIABLE] = value
        try:
            limits.factor()
        except ValueError:
            parser.error(f"--limits takes a positive number, such as 4, got {value}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an error: the known word nearest to `word`; without one, all known words if there are few."""
    listed = list(known)
    return _nearest(word, listed) or (f"; there are {', '.join(listed)}" if len(listed) <= 30 else "")


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def texts(kind: type[Any]) -> dict[str, str]:
    """Field -> its text in the docstring of a dataclass."""
    found: dict[str, str] = dict(re.findall(_FIELDS, kind.__doc__ or "", re.MULTILINE))
    return {name: " ".join(text.split()) for name, text in found.items()}


def add_fields(p: Parser, defaults: Any, without: Collection[str] = (), hidden: Collection[str] = ()) -> None:
    """Add every field of a record as an option; the record's value is the default.

    Args:
        p: the parser.
        defaults: the record, a dataclass.
        without: fields that become no option.
        hidden: fields whose options work but are not in the help.
    """
    kind = type(defaults)
    told, hints = texts(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        p.add_argument(
            option_of(field.name),
            type=hints[field.name],
            default=getattr(defaults, field.name),
            # None is null on the command line, as in JSON
            help=SUPPRESS if field.name in hidden else re.sub(r"\bNone\b", "null", told[field.name]),
        )


def add_settings(p: Parser, kinds: Mapping[str, type[Any]]) -> None:
    """Add the fields of several dataclasses as options. An option that is not given has no value.

    Args:
        p: the parser.
        kinds: name for the help -> dataclass. Fields with equal names become one option.
    """
    fields: dict[str, dict[str, type[Any]]] = {}
    for name, kind in kinds.items():
        for field in dataclasses.fields(kind):
            fields.setdefault(field.name, {})[name] = kind
    for field_name, owners in fields.items():
        hints = [typing.get_type_hints(kind)[field_name] for kind in owners.values()]
        flag = hints[0] is bool
        p.add_argument(
            option_of(field_name),
            default=SUPPRESS,
            help=f"{_told_of(owners, field_name, len(kinds))}{_default_of(owners.values(), field_name)}",
            **({"action": "store_true"} if flag else {"type": Union[tuple(hints)]}),  # noqa: UP007  # made here
        )


def settings_of(args: Any, kind: type[Any], kinds: Mapping[str, type[Any]], what: str) -> Any:
    """A record of a dataclass, made from the options that were given.

    Args:
        args: the parsed arguments.
        kind: the dataclass.
        kinds: all dataclasses whose fields are options.
        what: start of the error, such as "FILE is a detector".

    Raises:
        ValueError: an option of another dataclass was given.
    """
    ours = {field.name for field in dataclasses.fields(kind)}
    refuse_settings(args, kinds, what, ours)
    given = {name: getattr(args, name) for name in ours if name in args}
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        # the option takes the choices of every dataclass
        choices = _literals(hints[name])
        if choices and value not in choices:
            raise ValueError(
                f"{what}: {option_of(name)} takes one of {', '.join(map(str, choices))}, got {value}"
                f"{_nearest(str(value), map(str, choices))}"
            )
    return kind(**given)


def refuse_settings(args: Any, kinds: Mapping[str, type[Any]], what: str, but: Collection[str] = ()) -> None:
    """Raise a ValueError if an option was given for a field of these dataclasses, except for the fields in `but`."""
    theirs = {field.name for kind in kinds.values() for field in dataclasses.fields(kind)}.difference(but)
    wrong = sorted(option_of(name) for name in theirs if name in args)
    if wrong:
        raise ValueError(f"{what}: leave out {', '.join(wrong)}")


def check_at_most(option: str, value: int | None, most: float) -> None:
    """Raise a ValueError if an option's number is larger than `most`; None is not."""
    if value is not None and value > most:
        raise ValueError(f"{option} must be at most {most:,.0f}, got {value:,}")


def option_of(field: str) -> str:
    """The option for a field."""
    return "--" + field.replace("_", "-")


def _told_of(owners: Mapping[str, type[Any]], field: str, of: int) -> str:
    """The help of a field, and whose it is: a text for each owner, or for all whose texts are alike."""
    names: dict[str, list[str]] = {}
    for name, kind in owners.items():
        names.setdefault(texts(kind)[field].rstrip("."), []).append(name)
    if len(names) == 1 and len(owners) == of:
        return next(iter(names))
    return "; ".join(f"{', '.join(whose)}: {text}" for text, whose in names.items())


def _default_of(kinds: Iterable[type[Any]], name: str) -> str:
    values = [
        field.default for kind in kinds for field in dataclasses.fields(kind) if field.name == name and field.default
    ]
    told = " or ".join(dict.fromkeys(_shown(value) for value in values if value is not dataclasses.MISSING))
    return f" (default: {told})" if told else ""


def _hint(action: Action) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _choices(action: Action) -> list[str]:
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return [str(choice) for part in _parts(_hint(action)) for choice in _literals(part)]


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; for any other type the type itself."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(part for member in typing.get_args(hint) for part in _parts(member))
    return (hint,)


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _expected(action: Action) -> str:
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    return " or ".join(dict.fromkeys(_words(part) for part in _parts(_hint(action))))


def _words(hint: Any) -> str:
    if _literals(hint):
        return f"one of {', '.join(map(str, _literals(hint)))}"
    if typing.get_origin(hint) is tuple:
        return f"a list such as '{_form(hint)}'"
    if typing.get_origin(hint) is dict:
        return """an object such as '{"name": 1}'"""
    plain = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", str: "a text"}
    if hint in plain:
        return plain[hint]
    if isinstance(hint, type) and issubclass(hint, Path):
        return "a path"
    # jsonargparse's numbers, such as PositiveInt
    restriction = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", hint.__name__).lower()
    return f"a {restriction}".replace(" int", " whole number").replace(" float", " number")


def _form(hint: Any) -> str:
    """An example of a type's JSON."""
    if typing.get_origin(hint) is tuple:
        members = typing.get_args(hint)
        shown = [_form(members[0])] * 2 if members[-1] is Ellipsis else [_form(member) for member in members]
        return f"[{', '.join(shown)}]"
    return "0.5" if hint is float else "7"


def _metavar(action: Action) -> str:
    choices = _choices(action)
    if choices:
        return f"{{{','.join(choices)}}}" if len(choices) <= _LISTED else "NAME"
    hints = [part for part in _parts(_hint(action)) if part is not type(None)]
    hint = hints[0] if hints else None
    if typing.get_origin(hint) is tuple:
        return _form(hint).replace("7", "N").replace("0.5", "X")
    if typing.get_origin(hint) is dict:
        return "JSON"
    if hint is bool:
        return "{true,false}"
    if isinstance(hint, type):
        for kind, word in ((int, "N"), (float, "X"), (Path, "PATH")):
            if issubclass(hint, kind):
                return word
    return "NAME"


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


class _Help(DefaultHelpFormatter):
    """Help without types of Python: a word for the value in the option, and its default if it has one."""

    def _get_help_string(self, action: Action) -> str:
        # a sentence ends behind its default
        told = (action.help or "").rstrip(".")
        if action.required and action.option_strings:
            return f"{told} (required)"
        if action.default in (None, SUPPRESS, False) or action.default == [] or not action.option_strings:
            return told
        return f"{told} (default: {_shown(action.default)})".replace("%", "%%")

    def _metavar_formatter(self, action: Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        named = action.metavar if isinstance(action.metavar, str) and action.metavar != "[ITEM,...]" else None
        if action.option_strings and (named is None or named.startswith("{")):
            named = _metavar(action)
        return lambda size: (named or default_metavar,) * size
