"""Which tables and keys there are, what they are by default, and what does not go together."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from zramd.config import values
from zramd.config.document import ConfigError, Source, Table, suggest
from zramd.config.files import SUFFIX, drop_ins, find
from zramd.device.choice import parse_choice
from zramd.device.recompression import Recompression
from zramd.device.wanted import Wanted
from zramd.expressions import Size, total_memory
from zramd.listeners import PLAIN_TCP, is_public_address
from zramd.nbd.access import Access
from zramd.nbd.identity import UUID_LENGTH
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.tls import TlsMode, TlsSettings
from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX, make_runtime_directory, state_directory
from zramd.policy.rules import Mode, Rules, Watermark, parse_watermark
from zramd.settings import DESCRIPTION, DiskSettings, Settings, UnixAddress
from zramd.sizes import MAX_SIZE
from zramd.use import DEFAULT_FILE_SYSTEM, DEFAULT_OPTIONS, DEFAULT_SWAP_PRIORITY, Use
from zramd.zsmalloc.classes import MAX_CHAIN_SIZE, MIN_CHAIN_SIZE

MIN_MEMORY = 512 << 10
"""So that 64 KiB can be read unfragmented, which the protocol asks for."""
MIN_PAYLOAD = 1 << 20
"""What clients may expect whatever is advertised."""
MAX_LIMIT = 1 << 30
MAX_SECONDS = 1 << 31
MAX_PRIORITY = 32767
"""Of a swap area; it is at least -1, which leaves it to the kernel."""

TABLES = ("server", "tls", "access", "limits")
"""Those that are of no disk."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file and its drop-ins say: the settings, the files, and the tables with all keys that there are."""

    settings: Settings
    sources: tuple[Path, ...]
    tables: tuple[Table, ...]

    @classmethod
    def read(cls, path: Path, *, root: Path = Path("/")) -> "Configuration":
        """Read a configuration. The machine's memory, and drop-ins of the system, are found under `root`.

        Raises:
            ConfigError: a file cannot be read, or something in it is wrong.
            OSError: the default directories cannot be used.
        """
        # A system's file may be missing where there are drop-ins.
        names = drop_ins(path, root)
        sources = [Source.read(each) for each in ([path] if os.path.lexists(path) or not names else []) + names]
        tables = _tables(sources)
        ram = partial(total_memory, root)
        disks = [_disk(table, ram) for name, table in tables.items() if name not in TABLES]
        if not disks:
            raise ConfigError(f"{path}: there is no disk: add a table [zram0]")
        here = tuple(disk for disk in disks if isinstance(disk, DiskSettings))
        _require_own_paths(tables, here)
        settings = _settings(tables, here)
        for table in tables.values():
            table.end()
        settings = replace(settings, left_out=tuple(disk for disk in disks if isinstance(disk, str)))
        return cls(settings, tuple(source.path for source in sources), tuple(tables.values()))


def load(path: Path, *, stdio: bool = False, root: Path = Path("/")) -> Settings:
    """Return the settings in a configuration; `stdio` is as in Settings, the rest as in Configuration.read."""
    return replace(Configuration.read(path, root=root).settings, stdio=stdio)


def load_disk(name: str, *, root: Path = Path("/")) -> Settings:
    """Return the settings for a disk that is served by itself: the file NAME.toml, or its table of the default file.

    Raises:
        ConfigError: there is neither, or as above.
        OSError: as above.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"{name!r} is not the name of a disk, such as zram0")
    if (path := find(f"{name}{SUFFIX}", root)) is not None:
        return load(path, root=root)
    if (path := find(root=root)) is None:
        raise ConfigError(f"there is neither {root / 'etc/zramd'}/{name}.toml nor zramd.toml there")
    settings = load(path, root=root)
    if name not in [disk.name for disk in settings.disks] and name not in settings.left_out:
        raise ConfigError(f"{path}: there is no disk {name}: add a table [{name}]")
    return replace(
        settings,
        disks=tuple(disk for disk in settings.disks if disk.name == name),
        left_out=tuple(each for each in settings.left_out if each == name),
    )


def _tables(sources: list[Source]) -> dict[str, Table]:
    """Return the tables of files, of which later ones win, in the order in which they come first."""
    layers: dict[str, list[tuple[Source, dict[str, Any]]]] = {}
    for source in sources:
        for name, found in source.values.items():
            if not isinstance(found, dict):
                source.fail("", name, "every key belongs in a table, such as [server] or [zram0]")
            if name not in TABLES and not re.fullmatch(r"zram\d+", name, re.ASCII):
                source.fail(name, None, f"no such table{suggest(name, [*TABLES, 'zram0'])}")
            layers.setdefault(name, []).append((source, found))
    return {name: Table(name, layers.get(name, [])) for name in dict.fromkeys([*TABLES, *layers])}


def _require_own_paths(tables: dict[str, Table], disks: tuple[DiskSettings, ...]) -> None:
    owners: dict[Path, str] = {}
    for disk in disks:
        for key, path in (("state", disk.state), ("status", disk.status), ("admin", disk.admin)):
            if path in owners:
                tables[disk.name].fail(key, f"{path} is {owners[path]}")
            if path is not None:
                owners[path] = f"the {key} of {disk.name}"


def _settings(tables: dict[str, Table], disks: tuple[DiskSettings, ...]) -> Settings:
    server, access = tables["server"], tables["access"]
    tcp = server.take("tcp", values.addresses, [])
    web = server.take("web", values.address)
    metrics = server.take("metrics", values.address)
    paths = server.take("unix", values.paths, [])
    mode = server.take("unix-mode", values.mode, "0600")
    owner = server.take("unix-owner", values.find_user)
    group = server.take("unix-group", values.find_group)
    public = server.take("plain-tcp-beyond-loopback", values.boolean, False)
    tls = _tls(tables["tls"])
    for key, listened in (("web", web), ("metrics", metrics)):
        if listened and is_public_address(listened[0]):
            server.fail(key, f"is for this machine: a loopback address, not {listened[0] or 'all'}")
    if not public and tls.mode is not TlsMode.REQUIRE and any(is_public_address(host) for host, _ in tcp):
        server.fail("tcp", PLAIN_TCP)
    names = access.take("certificate-names", values.strings, [])
    if names and (tls.mode is not TlsMode.REQUIRE or tls.psk_file or not tls.verify_clients):
        access.fail("certificate-names", 'needs mode = "require" in [tls], and certificates of clients')
    return Settings(
        disks=disks,
        unix=tuple(
            UnixAddress(path, mode, -1 if owner is None else owner, -1 if group is None else group) for path in paths
        ),
        tcp=tcp,
        web=web,
        metrics=metrics,
        swap=server.take("swap", values.boolean, False),
        public=public,
        tls=tls,
        access=Access(
            users=access.take("users", lambda value: frozenset(map(values.find_user, values.strings(value))), []),
            groups=access.take("groups", lambda value: frozenset(map(values.find_group, values.strings(value))), []),
            names=frozenset(names),
        ),
        limits=_limits(tables["limits"]),
    )


def _tls(table: Table) -> TlsSettings:
    settings = TlsSettings(
        mode=table.take("mode", values.tls_mode, TlsMode.OFF.value),
        certificates=table.take("certificates", values.path),
        verify_clients=table.take("verify-clients", values.boolean, True),
        psk_file=table.take("psk-file", values.path),
    )
    if settings.mode is not TlsMode.OFF and (settings.certificates is None) == (settings.psk_file is None):
        table.fail("mode", "needs either `certificates`, a directory, or `psk-file`")
    return settings


def _limits(table: Table) -> Limits:
    default = DEFAULT_LIMITS
    return Limits(
        handshake_seconds=table.take("handshake-seconds", values.number(1, 3600), int(default.handshake_seconds)),
        option=table.take("option-size", values.size(4096, MAX_LIMIT), default.option),
        options=table.take("options", values.number(4, 1 << 20), default.options),
        name=table.take("name-length", values.number(UUID_LENGTH, default.name), default.name),
        payload=table.take("payload", values.size(MIN_PAYLOAD, MAX_LIMIT), default.payload),
        connections=table.take("connections", values.number(1, 1 << 16), default.connections),
        handshakes=table.take("handshakes", values.number(1, 1 << 16), default.handshakes),
        memory=table.take("memory-per-connection", values.size(MIN_MEMORY, MAX_LIMIT), default.memory),
    )


def _disk(table: Table, ram: Callable[[], int]) -> DiskSettings | str:
    """Return a disk, or the name of one that is not for a machine with that much memory, which `ram` returns."""
    limit = table.take("host-memory-limit", values.host_limit(ram), "none")
    volatile = table.take("volatile", values.boolean, False)
    state = table.take("state", values.path)
    if volatile and state is not None:
        table.fail("volatile", "`state` and `volatile` exclude each other")
    if state is None and not volatile:
        state = state_directory(table.name)
        table.settle("state", state)
    status = table.take("status", values.path)
    if status is None:
        status = make_runtime_directory() / f"{table.name}{STATUS_SUFFIX}"
        table.settle("status", status)
    admin = table.take("admin", values.path)
    if admin is None:
        admin = status.with_suffix(ADMIN_SUFFIX)
        table.settle("admin", admin)
    size = table.take("size", values.expression(ram, up=True))
    choice = table.take("compression-algorithm", lambda value: parse_choice(values.string(value)))
    disk = DiskSettings(
        name=table.name,
        wanted=Wanted(
            disksize=_bytes(size),
            keep_size=size is not None and size.varies,
            codec=choice.primary if choice else None,
            backing=table.take("writeback-device", values.path),
            chain_size=table.take("chain-size", values.number(MIN_CHAIN_SIZE, MAX_CHAIN_SIZE)),
            secondary=choice.secondary if choice else {},
            integrity=table.take("integrity", values.boolean, False),
        ),
        mem_limit=_bytes(table.take("resident-limit", values.expression(ram))),
        writeback_limit=_bytes(table.take("writeback-limit", values.expression(ram))),
        state=state,
        status=status,
        admin=admin,
        group=table.take("status-group", values.find_group),
        description=table.take("description", values.description, DESCRIPTION),
        read_only=table.take("read-only", values.boolean, False),
        use=_use(table),
        policy=_policy(table, choice.recompression if choice else None),
    )
    return table.name if limit is not None and ram() > limit.bytes else disk


def _bytes(size: Size | None) -> int | None:
    return size.bytes if size else None


def _use(table: Table) -> Use:
    """Return what the block device of a disk is for."""
    mount_point = table.take("mount-point", values.path)
    fs_type = table.take("fs-type", values.file_system)
    options = table.take("options", values.options, DEFAULT_OPTIONS)
    priority = table.take("swap-priority", values.number(-1, MAX_PRIORITY))
    if mount_point is not None and priority is not None:
        table.fail(
            "swap-priority", "`swap-priority` and `mount-point` exclude each other: a disk is swap or is mounted"
        )
    if mount_point is not None and fs_type == "swap":
        table.fail("fs-type", "swap has no `mount-point`")
    if mount_point is None and fs_type not in (None, "swap"):
        table.fail("fs-type", "needs a `mount-point`")
    fs_type = fs_type or DEFAULT_FILE_SYSTEM
    if mount_point is None:
        priority = DEFAULT_SWAP_PRIORITY if priority is None else priority
        table.settle("swap-priority", priority)
    else:
        table.settle("fs-type", fs_type)
    return Use(mount_point, fs_type, options, DEFAULT_SWAP_PRIORITY if priority is None else priority)


def _policy(disk: Table, recompression: Recompression | None) -> Rules:
    """Return the rules of the table [zram0.policy]."""
    table = disk.take_table("policy")
    default = Rules()
    mode = Mode.DRY_RUN if table.take("dry-run", values.boolean, False) else Mode.ON
    rules = Rules(
        mode=mode if table.take("enabled", values.boolean, False) else Mode.OFF,
        idle_after=table.take("idle-after", values.number(1, MAX_SECONDS), default.idle_after),
        writeback_after=table.take("writeback-after", values.number(0, MAX_SECONDS), default.writeback_after),
        low=table.take("memory-low", _watermark) or default.low,
        high=table.take("memory-high", _watermark) or default.high,
        pressure_some=table.take("pressure-some", values.number(1, 101), default.pressure_some),
        pressure_full=table.take("pressure-full", values.number(1, 101), default.pressure_full),
        write_budget=table.take("write-budget", values.size(0, MAX_SIZE), default.write_budget),
        busy_requests=table.take("busy-requests", values.number(0, 1 << 32), default.busy_requests),
        recompression=recompression,
    )
    if (rules.low.percent and rules.high.percent and rules.low.percent > rules.high.percent) or (
        rules.low.size and rules.high.size and rules.low.size > rules.high.size
    ):
        table.fail("memory-low", "must not be above memory-high")
    table.end()
    return rules


def _watermark(value: Any) -> Watermark:
    return parse_watermark(values.string(value))
