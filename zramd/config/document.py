"""TOML files merged key by key, as tables from which keys are taken. A key knows the file and the line it is from."""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

Value = TypeVar("Value")

MAX_LENGTH = 1 << 20
"""Characters of a file; a device may have no end."""

_HEADER = re.compile(r"""\s*\[\[?([^\]#]+)\]""")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the configuration."""

    path: Path
    text: str
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Read a file.

        Raises:
            ConfigError: it cannot be read, or is no TOML.
        """
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_LENGTH + 1)
            if len(text) > MAX_LENGTH:
                raise ConfigError(f"{path} has more than {MAX_LENGTH} characters: it is no configuration")
            return cls(path, text, tomllib.loads(text))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text") from error
        except ValueError as error:
            # TOMLDecodeError; and a number of thousands of digits, of which tomllib takes no notice.
            raise ConfigError(f"{path}: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: arrays or tables lie too deep in each other") from error

    def place(self, table: str, key: str | None = None) -> str:
        """Return FILE:LINE of a key, or of its table."""
        return f"{self.path}:{self._line(table, key)}"

    def fail(self, table: str, key: str | None, reason: str) -> NoReturn:
        """Refuse the file because of a key, or because of a table."""
        where = " ".join([f"[{quote(table)}]"] * bool(table) + ([] if key is None else [quote(key)]))
        raise ConfigError(f"{self.place(table, key)}: {where}: {reason}")

    def _line(self, table: str, key: str | None) -> int:
        """Return the number of the line where a key stands, or its table if it is not found. tomllib does not tell."""
        wanted = [part for part in (table, key) if part]
        inside, found = "", 1
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := _HEADER.match(line):
                inside = _plain(header[1])
                if inside == table:
                    found = number
            elif match := _KEY.match(line):
                full = ".".join(part for part in (inside, _plain(match[1])) if part)
                if key and full == ".".join(wanted):
                    return number
        return found


def _plain(dotted: str) -> str:
    """Return a dotted key without quotes and blanks."""
    return ".".join(part.strip().strip("\"'") for part in dotted.split("."))


@dataclass(frozen=True, slots=True)
class Taken:
    """A key that may stand in a table: its value as TOML has it, what that means, None if it is not set, its file."""

    key: str
    value: Any
    meaning: Any = None
    source: Source | None = None


class Table:
    """A table of the merged files, from which keys are taken; what nobody took is an error."""

    def __init__(self, name: str, layers: Iterable[tuple[Source, dict[str, Any]]]) -> None:
        self.name = name
        self.taken: list[Taken] = []
        self.tables: list[Table] = []
        self._layers = list(layers)
        self._known: list[str] = []

    @overload
    def take(self, key: str, convert: Callable[[Any], Value]) -> Value | None: ...
    @overload
    def take(self, key: str, convert: Callable[[Any], Value], default: object) -> Value: ...
    def take(self, key: str, convert: Callable[[Any], Value], default: object = None) -> Value | None:
        """Return a key's value, converted; if it is not there the default, which is as TOML has it, or None."""
        self._known.append(key)
        source, raw = self._find(key)
        if source is None:
            self.taken.append(Taken(key, default))
            return None if default is None else convert(default)
        try:
            value = convert(raw)
        except ValueError as error:
            source.fail(self.name, key, str(error))
        self.taken.append(Taken(key, raw, value, source))
        return value

    def settle(self, key: str, value: Any) -> None:
        """Let a key that was taken, and is not set, be what it comes to."""
        self.taken = [Taken(key, value) if taken.key == key and taken.source is None else taken for taken in self.taken]

    def take_table(self, key: str) -> "Table":
        """Return the table of that name inside this one, an empty one if it is not there."""
        self._known.append(key)
        inside = [(source, values[key]) for source, values in self._layers if key in values]
        for source, values in inside:
            if not isinstance(values, dict):
                source.fail(self.name, key, f"must be a table: write [{self.name}.{key}]")
        table = Table(f"{self.name}.{key}", inside)
        self.tables.append(table)
        return table

    def end(self) -> None:
        """Check that every key was taken."""
        for source, values in self._layers:
            for key in values:
                if key not in self._known:
                    source.fail(self.name, key, f"no such key{suggest(key.removeprefix('zram-'), self._known)}")

    def fail(self, key: str, reason: str) -> NoReturn:
        """Refuse the configuration because of a key.

        Raises:
            ConfigError: always.
        """
        source, _ = self._find(key)
        if source is None:
            raise ConfigError(f"[{quote(self.name)}] {quote(key)}: {reason}")
        source.fail(self.name, key, reason)

    def _find(self, key: str) -> tuple[Source, Any] | tuple[None, None]:
        for source, values in reversed(self._layers):
            if key in values:
                return source, values[key]
        return None, None


def quote(key: str) -> str:
    """Return the name of a table or key, quoted if it could not stand in the file as it is."""
    return key if re.fullmatch(r"[\w-]+(\.policy)?", key) else repr(key)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error on a name: the nearest one that there is, or all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"
