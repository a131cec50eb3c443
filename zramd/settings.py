"""What a daemon is to serve, where, to whom, and within which limits."""

from dataclasses import dataclass, field
from pathlib import Path

from zramd.device.wanted import Wanted
from zramd.nbd.access import DEFAULT_ACCESS, Access
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.tls import TlsSettings
from zramd.policy.rules import DEFAULT_RULES, Rules
from zramd.use import DEFAULT_USE, Use

DESCRIPTION = "zramd compressed memory"
"""What clients read about an export that has no description of its own."""


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """A disk, which is an export of the same name.

    A disksize of 0 leaves it uninitialised. `mem_limit` None is as the kept state says. `writeback_limit` is in bytes,
    and is for a disk that has none; of one that is kept, what is left stays. `state` None keeps nothing.
    `status` and `admin` are its two sockets, None for none; `group` is the gid that may read the first.
    """

    name: str
    wanted: Wanted
    mem_limit: int | None
    state: Path | None
    status: Path | None
    admin: Path | None
    group: int | None = None
    description: str = DESCRIPTION
    read_only: bool = False
    writeback_limit: int | None = None
    policy: Rules = DEFAULT_RULES
    use: Use = DEFAULT_USE


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket to listen on; an owner (uid) or group (gid) of -1 is the server's own."""

    path: Path
    mode: int = 0o600
    owner: int = -1
    group: int = -1


@dataclass(frozen=True, slots=True)
class Settings:
    """A daemon: its disks, the first of which is the default export, and where NBD clients find it.

    The disks in `left_out` are not for a machine with as much memory as this one.
    With `swap` it may be swapped to: its memory is locked, and a supervisor starts it anew if it dies.
    `web` is where browsers find it, and `metrics` where Prometheus does: loopback addresses. `public` lets NBD have
    addresses that other machines reach without requiring TLS. With `stdio`, the one client is on standard input.
    """

    disks: tuple[DiskSettings, ...]
    unix: tuple[UnixAddress, ...] = ()
    tcp: tuple[tuple[str, int], ...] = ()
    web: tuple[str, int] | None = None
    metrics: tuple[str, int] | None = None
    swap: bool = False
    public: bool = False
    stdio: bool = False
    tls: TlsSettings = field(default_factory=TlsSettings)
    access: Access = DEFAULT_ACCESS
    limits: Limits = DEFAULT_LIMITS
    left_out: tuple[str, ...] = ()
