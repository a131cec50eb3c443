"""The machine that is looked at: the files of its kernel and of its administrator, and what of zramd is there."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zramd.paths import STATUS_SUFFIX, server_sockets
from zramd.status.client import StatusError, ask

SECONDS = 2.0
"""What a server that is well takes to answer."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A disk that is served or configured: what it may hold, and what it has of that. Sizes are in bytes.

    `limit` is 0 where there is none; `state` is where its regions lie, None if that is not known, or memory of the
    server's own.
    """

    name: str
    size: int
    limit: int = 0
    used: int = 0
    state: Path | None = None
    swap: bool = False

    @property
    def expected(self) -> int:
        """Memory that it will take: half of its size, which is what the kernel's document on zram expects."""
        half = self.size // 2
        return min(half, self.limit) if self.limit else half

    @property
    def basis(self) -> str:
        """Why so much is expected."""
        return "by its limit" if self.limit and self.limit <= self.size // 2 else "at 2:1"

    @property
    def most(self) -> int:
        """Memory that it takes if nothing compresses."""
        return min(self.size, self.limit) if self.limit else self.size


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking a socket where a server may be: all that it tells, or an error."""

    path: Path
    facts: dict[str, object] | None
    error: str = ""


class Machine:
    """A machine whose files are found under `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def read(self, name: str) -> str:
        """Return a file's text without its last newline, "" if it cannot be read."""
        try:
            return (self.root / name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def exists(self, name: str) -> bool:
        """Say whether there is a file."""
        return (self.root / name).exists()

    @property
    def release(self) -> str:
        """Of the kernel, such as 6.12.9-amd64."""
        return self.read("proc/sys/kernel/osrelease")

    @property
    def version(self) -> tuple[int, ...]:
        """Of the kernel, such as (6, 12)."""
        return tuple(map(int, re.findall(r"\d+", self.release)[:2]))

    def memory(self, name: str) -> int:
        """Return a line of /proc/meminfo, in bytes; 0 if it is not there."""
        match = re.search(rf"^{name}:\s*(\d+)", self.read("proc/meminfo"), re.MULTILINE)
        return int(match[1]) << 10 if match else 0

    def has_capability(self, bit: int) -> bool:
        """Say whether this process has a capability, and may use it."""
        match = re.search(r"^CapEff:\s*([0-9a-f]+)$", self.read("proc/self/status"), re.MULTILINE)
        return bool(int(match[1], 16) >> bit & 1) if match else False

    def limit(self, name: str) -> int | None:
        """Return the hard limit of this process in /proc/self/limits, such as "Max open files"; None if unlimited."""
        match = re.search(rf"^{name} +\w+ +(\w+)", self.read("proc/self/limits"), re.MULTILINE)
        return int(match[1]) if match and match[1].isdecimal() else None

    def tool(self, name: str) -> bool:
        """Say whether there is a program, also where only root looks."""
        places = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"]
        here = os.pathsep.join(str(self.root / place.lstrip("/")) for place in places)
        return shutil.which(name, path=here) is not None

    def room(self, path: Path) -> int:
        """Return the bytes that can be written to a directory, or to the nearest one above that exists."""
        existing = next(level for level in (path, *path.parents) if level.exists())
        found = os.statvfs(existing)
        return found.f_bavail * found.f_frsize

    def servers(self) -> Iterator[Answer]:
        """Ask every socket where a server may be."""
        try:
            paths = server_sockets(STATUS_SUFFIX)
        except OSError:
            return
        for path in paths:
            try:
                yield Answer(path, json.loads(ask(path, "json", SECONDS)))
            except (StatusError, ValueError) as error:
                yield Answer(path, None, str(error))
