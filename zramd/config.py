"""The configuration file: TOML in, settings out, and errors that name the file, the line, the key and what to do.

    [server]   where to listen         [access]  who may connect       [zram0], [zram1]...  the disks, in this order
    [tls]      certificates            [limits]  what clients may take

Keys of a disk are those of zram-generator where it has them.
"""

import difflib
import grp
import pwd
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from zramd.device.choice import parse_choice
from zramd.device.opening import Wanted
from zramd.device.recompression import Recompression
from zramd.nbd.access import Access
from zramd.nbd.identity import MAX_DESCRIPTION, UUID_LENGTH
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.tls import TlsMode, TlsSettings
from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX, make_runtime_directory, state_directory
from zramd.policy.rules import Mode, Rules, Watermark, parse_watermark
from zramd.settings import DESCRIPTION, DiskSettings, Settings, UnixAddress
from zramd.sizes import parse_size
from zramd.zsmalloc.classes import MAX_CHAIN_SIZE, MIN_CHAIN_SIZE

MIN_MEMORY = 512 << 10
"""So that 64 KiB can be read unfragmented, which the protocol asks for."""
MIN_PAYLOAD = 1 << 20
"""What clients may expect whatever is advertised."""
MAX_LIMIT = 1 << 30
MAX_SECONDS = 1 << 31
MAX_ID = (1 << 32) - 2
"""The largest uid and gid; to chown, the next one means to change nothing."""

Value = TypeVar("Value")
Default = TypeVar("Default")


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line."""


def load(path: Path, *, stdio: bool = False) -> Settings:
    """Read a configuration; `stdio` is as in Settings.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
        OSError: the default directories cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except ValueError as error:
        # TOMLDecodeError; and a number of thousands of digits, of which tomllib takes no notice.
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: arrays or tables lie too deep in each other") from error
    names = ["server", "tls", "access", "limits"]
    for name, values in document.items():
        if not isinstance(values, dict):
            _fail(path, text, "", name, "every key belongs in a table, such as [server] or [zram0]")
        if name not in names and not re.fullmatch(r"zram\d+", name, re.ASCII):
            _fail(path, text, name, None, f"no such table{_suggest(name, [*names, 'zram0'])}")
    tables = {name: Table(path, text, name, values) for name, values in document.items()}
    for name in names:
        tables.setdefault(name, Table(path, text, name, {}))
    disks = tuple(_disk(table) for name, table in tables.items() if name not in names)
    if not disks:
        raise ConfigError(f"{path}: there is no disk: add a table [zram0]")
    settings = replace(_settings(tables, disks), stdio=stdio)
    for table in tables.values():
        table.end()
    return settings


class Table:
    """A table of the file, from which keys are taken; what nobody took is an error."""

    def __init__(self, path: Path, text: str, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self._path = path
        self._text = text
        self._values = values
        self._known: list[str] = []

    def take(self, key: str, convert: Callable[[Any], Value], default: Default) -> Value | Default:
        """Return a key's value, converted; or the default, if it is not there."""
        self._known.append(key)
        if key not in self._values:
            return default
        try:
            return convert(self._values[key])
        except ValueError as error:
            self.fail(key, str(error))

    def take_table(self, key: str) -> "Table":
        """Return the table of that name inside this one, an empty one if it is not there."""
        self._known.append(key)
        values = self._values.get(key, {})
        if not isinstance(values, dict):
            self.fail(key, f"must be a table: write [{self.name}.{key}]")
        return Table(self._path, self._text, f"{self.name}.{key}", values)

    def end(self) -> None:
        """Check that every key was taken."""
        for key in self._values:
            if key not in self._known:
                self.fail(key, f"no such key{_suggest(key, self._known)}")

    def fail(self, key: str | None, reason: str) -> NoReturn:
        """Refuse the file because of a key, or because of the whole table."""
        _fail(self._path, self._text, self.name, key, reason)


def _fail(path: Path, text: str, table: str, key: str | None, reason: str) -> NoReturn:
    where = " ".join([f"[{_name(table)}]"] * bool(table) + ([] if key is None else [_name(key)]))
    raise ConfigError(f"{path}:{_line(text, table, key)}: {where}: {reason}")


def _name(key: str) -> str:
    """Return the name of a table or key, quoted if it could not stand in the file as it is."""
    return key if re.fullmatch(r"[\w-]+(\.policy)?", key) else repr(key)


def _line(text: str, table: str, key: str | None) -> int:
    """Return the number of the line where a key stands, or its table if it is not found. tomllib does not tell."""
    inside, found = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)", line):
            inside = header[1]
            if inside == table:
                found = number
        elif key and inside == table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line):
            return number
    return found


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def _settings(tables: dict[str, Table], disks: tuple[DiskSettings, ...]) -> Settings:
    server, access = tables["server"], tables["access"]
    tcp = server.take("tcp", _addresses, ())
    web = server.take("web", lambda value: parse_address(_string(value)), None)
    metrics = server.take("metrics", lambda value: parse_address(_string(value)), None)
    paths = server.take("unix", _paths, ())
    mode = server.take("unix-mode", _mode, 0o600)
    owner = server.take("unix-owner", find_user, -1)
    group = server.take("unix-group", find_group, -1)
    tls = _tls(tables["tls"])
    names = access.take("certificate-names", _strings, ())
    if names and (tls.mode is not TlsMode.REQUIRE or tls.psk_file or not tls.verify_clients):
        access.fail("certificate-names", 'needs mode = "require" in [tls], and certificates of clients')
    return Settings(
        disks=disks,
        unix=tuple(UnixAddress(path, mode, owner, group) for path in paths),
        tcp=tcp,
        web=web,
        metrics=metrics,
        swap=server.take("swap", _boolean, False),
        public=server.take("plain-tcp-beyond-loopback", _boolean, False),
        tls=tls,
        access=Access(
            users=access.take("users", lambda value: frozenset(map(find_user, _strings(value))), frozenset()),
            groups=access.take("groups", lambda value: frozenset(map(find_group, _strings(value))), frozenset()),
            names=frozenset(names),
        ),
        limits=_limits(tables["limits"]),
    )


def _tls(table: Table) -> TlsSettings:
    settings = TlsSettings(
        mode=table.take("mode", _tls_mode, TlsMode.OFF),
        certificates=table.take("certificates", _path, None),
        verify_clients=table.take("verify-clients", _boolean, True),
        psk_file=table.take("psk-file", _path, None),
    )
    if settings.mode is not TlsMode.OFF and (settings.certificates is None) == (settings.psk_file is None):
        table.fail("mode", "needs either `certificates`, a directory, or `psk-file`")
    return settings


def _limits(table: Table) -> Limits:
    default = DEFAULT_LIMITS
    return Limits(
        handshake_seconds=table.take("handshake-seconds", _number(1, 3600), default.handshake_seconds),
        option=table.take("option-size", _size(4096, MAX_LIMIT), default.option),
        options=table.take("options", _number(4, 1 << 20), default.options),
        name=table.take("name-length", _number(UUID_LENGTH, default.name), default.name),
        payload=table.take("payload", _size(MIN_PAYLOAD, MAX_LIMIT), default.payload),
        connections=table.take("connections", _number(1, 1 << 16), default.connections),
        handshakes=table.take("handshakes", _number(1, 1 << 16), default.handshakes),
        memory=table.take("memory-per-connection", _size(MIN_MEMORY, MAX_LIMIT), default.memory),
    )


def _disk(table: Table) -> DiskSettings:
    volatile = table.take("volatile", _boolean, False)
    state = table.take("state", _path, None)
    if volatile and state is not None:
        table.fail("volatile", "`state` and `volatile` exclude each other")
    if state is None and not volatile:
        state = state_directory(table.name)
    status = table.take("status", _path, None) or make_runtime_directory() / f"{table.name}{STATUS_SUFFIX}"
    choice = table.take("compression-algorithm", lambda value: parse_choice(_string(value)), None)
    return DiskSettings(
        name=table.name,
        wanted=Wanted(
            disksize=table.take("size", _size(0), None),
            codec=choice.primary if choice else None,
            backing=table.take("writeback-device", _path, None),
            chain_size=table.take("chain-size", _number(MIN_CHAIN_SIZE, MAX_CHAIN_SIZE), None),
            secondary=choice.secondary if choice else {},
            integrity=table.take("integrity", _boolean, False),
        ),
        mem_limit=table.take("resident-limit", _size(0), None),
        writeback_limit=table.take("writeback-limit", _size(0), None),
        state=state,
        status=status,
        admin=table.take("admin", _path, None) or status.with_suffix(ADMIN_SUFFIX),
        group=table.take("status-group", find_group, None),
        description=table.take("description", _description, DESCRIPTION),
        read_only=table.take("read-only", _boolean, False),
        policy=_policy(table, choice.recompression if choice else None),
    )


def _policy(disk: Table, recompression: Recompression | None) -> Rules:
    """Return the rules of the table [zram0.policy]."""
    table = disk.take_table("policy")
    default = Rules()
    mode = Mode.DRY_RUN if table.take("dry-run", _boolean, False) else Mode.ON
    rules = Rules(
        mode=mode if table.take("enabled", _boolean, False) else Mode.OFF,
        idle_after=table.take("idle-after", _number(1, MAX_SECONDS), default.idle_after),
        writeback_after=table.take("writeback-after", _number(0, MAX_SECONDS), default.writeback_after),
        low=table.take("memory-low", _watermark, default.low),
        high=table.take("memory-high", _watermark, default.high),
        pressure_some=table.take("pressure-some", _number(1, 101), default.pressure_some),
        pressure_full=table.take("pressure-full", _number(1, 101), default.pressure_full),
        write_budget=table.take("write-budget", _size(0), default.write_budget),
        busy_requests=table.take("busy-requests", _number(0, 1 << 32), default.busy_requests),
        recompression=recompression,
    )
    if (rules.low.percent and rules.high.percent and rules.low.percent > rules.high.percent) or (
        rules.low.size and rules.high.size and rules.low.size > rules.high.size
    ):
        table.fail("memory-low", "must not be above memory-high")
    table.end()
    return rules


def _watermark(value: Any) -> Watermark:
    return parse_watermark(_string(value))


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
    text = _string(value)
    try:
        number = int(text) if text.isdecimal() else by_name(text)
    except KeyError:
        raise ValueError(f"there is no {kind} {text!r}") from None
    if number > MAX_ID:
        raise ValueError(f"{text} is not the number of a user or group")
    return number


def _string(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text in quotes")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(_string, value)) if isinstance(value, list) else (_string(value),)


def _addresses(value: Any) -> tuple[tuple[str, int], ...]:
    return tuple(map(parse_address, _strings(value)))


def _paths(value: Any) -> tuple[Path, ...]:
    return tuple(map(_path, _strings(value)))


def _path(value: Any) -> Path:
    path = Path(_string(value))
    if not path.is_absolute():
        raise ValueError(f"{value!r} is not an absolute path")
    if not path.name or "\0" in str(path):
        raise ValueError(f"{value!r} cannot be the name of a file")
    return path


def _description(value: Any) -> str:
    text = _string(value)
    if "\0" in text or len(text.encode()) > MAX_DESCRIPTION:
        raise ValueError(f"a description has no NUL and at most {MAX_DESCRIPTION} bytes")
    return text


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _mode(value: Any) -> int:
    # A number would be 0o660 or 660, and who reads it could not tell which was meant.
    text = value if isinstance(value, str) else ""
    if not re.fullmatch("0?[0-7]{3}", text, re.ASCII):
        raise ValueError(f'{value!r} is not a mode, as in "0660"')
    return int(text, 8)


def _tls_mode(value: Any) -> TlsMode:
    try:
        return TlsMode(value)
    except ValueError:
        modes = ", ".join(mode.value for mode in TlsMode)
        raise ValueError(f"{value!r} is not one of {modes}") from None


def _number(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{value!r} is not a number from {low} to {high}")
        return value

    return convert


def _size(low: int, high: int | None = None) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        size = parse_size(_string(value))
        if size < low or (high is not None and size > high):
            raise ValueError(f"{value!r} is not a size from {low} to {high} bytes")
        return size

    return convert
