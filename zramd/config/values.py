"""What the values of keys may be: functions that turn what TOML has into what a setting is, or raise ValueError."""

import grp
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zramd.expressions import Size, parse
from zramd.nbd.identity import MAX_DESCRIPTION
from zramd.nbd.tls import TlsMode
from zramd.sizes import parse_size

MAX_ID = (1 << 32) - 2
"""The largest uid and gid; to chown, the next one means to change nothing."""


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is not an address.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT, as in localhost:10809 or [::1]:10809")
    return host.removeprefix("[").removesuffix("]"), int(port)


def find_user(value: str | int) -> int:
    """Return the uid of a user by name or number.

    Raises:
        ValueError: there is no such user.
    """
    return _find(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def find_group(value: str | int) -> int:
    """Return the gid of a group by name or number.

    Raises:
        ValueError: there is no such group.
    """
    return _find(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _find(value: str | int, kind: str, by_name: Callable[[str], int]) -> int:
    text = string(value)
    try:
        number = int(text) if text.isdecimal() else by_name(text)
    except KeyError:
        raise ValueError(f"there is no {kind} {text!r}") from None
    if number > MAX_ID:
        raise ValueError(f"{text} is not the number of a user or group")
    return number


def string(value: Any) -> str:
    """Return a text; a number is one, too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text in quotes")
    return value


def strings(value: Any) -> tuple[str, ...]:
    """Return a list of texts, or the one that there is."""
    return tuple(map(string, value)) if isinstance(value, list) else (string(value),)


def address(value: Any) -> tuple[str, int]:
    """Return an address."""
    return parse_address(string(value))


def addresses(value: Any) -> tuple[tuple[str, int], ...]:
    """Return addresses."""
    return tuple(map(parse_address, strings(value)))


def paths(value: Any) -> tuple[Path, ...]:
    """Return absolute paths."""
    return tuple(map(path, strings(value)))


def path(value: Any) -> Path:
    """Return an absolute path."""
    found = Path(string(value))
    if not found.is_absolute():
        raise ValueError(f"{value!r} is not an absolute path")
    if not found.name or "\0" in str(found):
        raise ValueError(f"{value!r} cannot be the name of a file")
    return found


def description(value: Any) -> str:
    """Return the description of an export."""
    text = string(value)
    if "\0" in text or len(text.encode()) > MAX_DESCRIPTION:
        raise ValueError(f"a description has no NUL and at most {MAX_DESCRIPTION} bytes")
    return text


def boolean(value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def mode(value: Any) -> int:
    """Return the bits of a mode."""
    # A number would be 0o660 or 660, and who reads it could not tell which was meant.
    text = value if isinstance(value, str) else ""
    if not re.fullmatch("0?[0-7]{3}", text, re.ASCII):
        raise ValueError(f'{value!r} is not a mode, as in "0660"')
    return int(text, 8)


def tls_mode(value: Any) -> TlsMode:
    """Return a mode of TLS."""
    try:
        return TlsMode(value)
    except ValueError:
        modes = ", ".join(each.value for each in TlsMode)
        raise ValueError(f"{value!r} is not one of {modes}") from None


def number(low: int, high: int) -> Callable[[Any], int]:
    """Return what takes a number from `low` to `high`."""

    def convert(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{value!r} is not a number from {low} to {high}")
        return value

    return convert


def size(low: int, high: int) -> Callable[[Any], int]:
    """Return what takes a size from `low` to `high` bytes."""

    def convert(value: Any) -> int:
        found = parse_size(string(value))
        if not low <= found <= high:
            raise ValueError(f"{value!r} is not a size from {low} to {high} bytes")
        return found

    return convert


def expression(ram: Callable[[], int], *, up: bool = False) -> Callable[[Any], Size]:
    """Return what takes a size, or an expression of the memory that `ram` returns; `up` is as in `evaluate`."""
    return lambda value: parse(string(value), ram, up=up)


def host_limit(ram: Callable[[], int]) -> Callable[[Any], Size | None]:
    """Return what takes the same, or "none"."""
    return lambda value: None if value == "none" else parse(string(value), ram)


def file_system(value: Any) -> str:
    """Return the name of a file system, as `mkfs.NAME` has it."""
    text = string(value)
    if not re.fullmatch(r"[a-z][a-z0-9._-]{0,31}", text):
        raise ValueError(f"{value!r} is not the name of a file system, as in ext4")
    return text


def options(value: Any) -> str:
    """Return options with commas between them, as mount(8) and swapon(8) take them; there may be none."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]*", value):
        raise ValueError(f'{value!r} is not a list of options, as in "discard,noatime"')
    return value
