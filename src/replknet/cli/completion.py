"""Shell completions for the command line, written by shtab."""

import argparse
import importlib
from argparse import Action, ArgumentParser

import shtab

from replknet.cli.main import COMMANDS


def script(shell: str) -> str:
    """A script that completes commands, options and their choices in bash, zsh or tcsh."""
    whole = ArgumentParser(prog="replknet")
    commands = whole.add_subparsers()
    for name, told in COMMANDS.items():
        sub = commands.add_parser(name, help=told, description=told)
        known = set(sub._option_string_actions)
        for action in importlib.import_module(f"replknet.cli.{name}").arguments()._actions:
            if action.help != argparse.SUPPRESS and not known & set(action.option_strings):
                _add(sub, action)
    text: str = shtab.complete(whole, shell=shell)
    return text


def _add(sub: ArgumentParser, action: Action) -> None:
    """Add an option in argparse's plain form: a shell completes only names, choices and files."""
    flag = action.nargs == 0
    if not action.option_strings:
        added = sub.add_argument(action.dest, nargs="*", choices=action.choices)
    elif flag:
        added = sub.add_argument(*action.option_strings, action="store_true", help="")
    else:
        added = sub.add_argument(*action.option_strings, choices=action.choices, help="")
    if not flag and action.choices is None:
        added.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
