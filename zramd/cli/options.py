"""Option types that several verbs use, and the option that every client verb has."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from zramd.cli.completion import complete_sockets
from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX

Command = TypeVar("Command", bound=Callable[..., Any])
Value = TypeVar("Value")


class Parsed(click.ParamType[Value]):
    """An option whose text a function turns into a value; its ValueError says what is wrong."""

    def __init__(self, name: str, parse: Callable[[str], Value]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        """Return the value."""
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def describe(error: OSError) -> str:
    """Return one line on what could not be done, with the file if there is one."""
    reason = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason


def later(module: str, name: str) -> Callable[[str], Any]:
    """Return a function of a module that is imported when it is called: for help, it is not needed."""
    return lambda text: getattr(importlib.import_module(module), name)(text)


def status_option(command: Command) -> Command:
    """Add --status to a client verb."""
    return _socket_option(STATUS_SUFFIX)(command)


def admin_option(command: Command) -> Command:
    """Add --admin to a verb that changes something."""
    return _socket_option(ADMIN_SUFFIX)(command)


def _socket_option(suffix: str) -> Callable[[Command], Command]:
    kind = suffix[1:]
    return click.option(
        f"--{kind}",
        "socket",
        type=click.Path(path_type=Path, readable=False),
        shell_complete=complete_sockets(suffix),
        help=f"{kind.capitalize()} socket of the disk. Default: that of the one disk that is served.",
    )
