"""Option types that several verbs use, and the option that every client verb has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from zramd.sizes import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """Bytes, or a number with a suffix of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT; an IPv6 host stands in brackets."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return the host and the port."""
        if isinstance(value, tuple):
            return value
        host, colon, port = value.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            self.fail(f"{value!r} is not HOST:PORT, as in localhost:10809 or [::1]:10809", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


def status_option(command: Command) -> Command:
    """Add --status to a client verb."""
    return click.option(
        "--status",
        "socket",
        type=click.Path(path_type=Path),
        help="Status socket of the server. Default: that of the one server that runs.",
    )(command)
