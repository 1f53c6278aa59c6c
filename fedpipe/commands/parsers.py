"""Parsers of the command line: errors in one line, and modules that are imported when asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NoReturn

from fedpipe.errors import ConfigError

Declare = Callable[[argparse.ArgumentParser, Any], None]
"""Takes the parser and the module of a command; declares its arguments and what they call."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps every command and its summary on one line."""

    def add_argument(self, action: argparse.Action) -> None:
        """Make room for a command's name."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # Python 3.11 forgets that commands are indented below their title.
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """Reports its errors as ours: one line, exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; what is left are overrides, at which argparse stops after an option."""
        namespace, rest = super().parse_known_args(args, namespace)
        for argument in rest:
            if argument.startswith("-") or "=" not in argument:
                self.error(f"unknown argument {argument!r}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Raise what argparse has to say."""
        raise ConfigError(f"command line: {message}. See {self.prog} --help.")


class _CommandParser(Parser):
    """Imports the module of its command when that command is the one that was asked for."""

    module: str
    declare: Declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.declare(self, import_module(f"fedpipe.commands.{self.module}"))
        return super().parse_known_args(args, namespace)


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, tuple[str, str]],
    declare: Declare,
    *,
    title: str,
    metavar: str,
) -> None:
    """Let a parser choose among commands, and import the module of the chosen one only.

    Args:
        parser: Of the program, or of a command that has commands of its own.
        commands: By name, a module in ``fedpipe.commands``, and a line of the help.
        declare: Declares the arguments of a command.
        title: Heads the commands in the help.
        metavar: Stands for one of them.
    """
    choice = parser.add_subparsers(
        title=title, metavar=metavar, required=True, parser_class=_CommandParser
    )
    for name, (module, summary) in commands.items():
        command = choice.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        command.module, command.declare = module, declare
