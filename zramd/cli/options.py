"""Option types that several verbs use, and the option that every client verb has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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


def status_option(command: Command) -> Command:
    """Add --status to a client verb."""
    return click.option(
        "--status",
        "socket",
        type=click.Path(path_type=Path),
        help="Status socket of the disk. Default: that of the one disk that is served.",
    )(command)


def admin_option(command: Command) -> Command:
    """Add --admin to a verb that changes something."""
    return click.option(
        "--admin",
        "socket",
        type=click.Path(path_type=Path),
        help="Admin socket of the disk. Default: that of the one disk that is served.",
    )(command)
