"""Parsers of the command line: they report errors in one line and import modules on demand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NoReturn

from fedpipe.errors import ConfigError

Declare = Callable[[argparse.ArgumentParser, Any], None]
"""Declares the arguments of a command, from its parser and its module."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps every command and its summary on one line."""

    def add_argument(self, action: argparse.Action) -> None:
        """Widen the column for the name of a command."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # Python 3.11 forgets that commands are indented below their title.
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """A parser that reports its errors like ours: one line and exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; the rest are overrides, where argparse stops after an option."""
        namespace, rest = super().parse_known_args(args, namespace)
        for argument in rest:
            if argument.startswith("-") or "=" not in argument:
                self.error(f"unknown argument {argument!r}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Raise a message of argparse as an error of ours."""
        raise ConfigError(f"command line: {message}. See {self.prog} --help.")


class _CommandParser(Parser):
    """A parser that imports the module of its command when the user asks for that command."""

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
    """Add commands to a parser; only the module of the chosen command is imported.

    Args:
        parser: Parser of the program, or of a command with commands of its own.
        commands: By name, a module in ``fedpipe.commands`` and a line of help.
        declare: Declares the arguments of a command.
        title: Heading of the commands in the help.
        metavar: Placeholder for a command in the help.
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
