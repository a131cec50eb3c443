"""Option types that several verbs use, and the option that every client verb has."""

import grp
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


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is not an address.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT, as in localhost:10809 or [::1]:10809")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_group(text: str) -> int:
    """Return the gid of a group by name or number.

    Raises:
        ValueError: there is no such group.
    """
    if text.isdecimal():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {text!r}") from None


def status_option(command: Command) -> Command:
    """Add --status to a client verb."""
    return click.option(
        "--status",
        "socket",
        type=click.Path(path_type=Path),
        help="Status socket of the server. Default: that of the one server that runs.",
    )(command)


def admin_option(command: Command) -> Command:
    """Add --admin to a verb that changes something."""
    return click.option(
        "--admin",
        "socket",
        type=click.Path(path_type=Path),
        help="Admin socket of the server. Default: that of the one server that runs.",
    )(command)
