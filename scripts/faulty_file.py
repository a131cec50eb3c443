"""A file that fails where and how it is told to: a FUSE file system with one file, `store`, on another file.

Run by Debian's Python, which has fusepy:  faulty_file.py BACKING MOUNTPOINT FAULTS

FAULTS is a file of JSON that is read at each request: `reads` and `writes` are lists of [kind, start, end], bytes that
a request must touch to fail. A kind is an error (`EIO`), `short` (half of what was asked for), `damaged` (these bytes
come back with all bits flipped), or `hang` (until FAULTS says otherwise).
"""

import errno
import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from fusepy import FUSE, FuseOSError, Operations

NAME = "/store"
LOOK_SECONDS = 0.01


class FaultyFile(Operations):  # type: ignore[misc]
    """The file system."""

    def __init__(self, backing: Path, faults: Path) -> None:
        self._fd = os.open(backing, os.O_RDWR)
        self._faults = faults

    def getattr(self, path: str, fh: object = None) -> dict[str, Any]:
        """Describe the directory or the file."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path != NAME:
            raise FuseOSError(errno.ENOENT)
        found = os.fstat(self._fd)
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": found.st_size, "st_blocks": found.st_blocks}

    def readdir(self, path: str, fh: object) -> list[str]:
        """List the file."""
        return [".", "..", NAME[1:]]

    def open(self, path: str, flags: int) -> int:
        """Open the file."""
        return 0

    def read(self, path: str, size: int, offset: int, fh: object) -> bytes:
        """Read, or not."""
        data = os.pread(self._fd, size, offset)
        for kind, start, end in self._met("reads", offset, size):
            if kind == "short":
                data = data[: size // 2]
            elif kind == "damaged":
                first, last = max(start, offset) - offset, min(end, offset + size) - offset
                data = data[:first] + bytes(byte ^ 0xFF for byte in data[first:last]) + data[last:]
            else:
                raise FuseOSError(getattr(errno, kind))
        return data

    def write(self, path: str, data: bytes, offset: int, fh: object) -> int:
        """Write, or not."""
        for kind, _, _ in self._met("writes", offset, len(data)):
            if kind == "short":
                return os.pwrite(self._fd, data[: len(data) // 2], offset)
            raise FuseOSError(getattr(errno, kind))
        return os.pwrite(self._fd, data, offset)

    def fsync(self, path: str, datasync: int, fh: object) -> int:
        """Say that it is on the medium."""
        return 0

    def _met(self, what: str, offset: int, size: int) -> list[tuple[str, int, int]]:
        """Return the faults that a request meets, once none of them is to hang."""
        while True:
            told = json.loads(self._faults.read_text())[what]
            met = [(kind, start, end) for kind, start, end in told if start < offset + size and offset < end]
            if not any(kind == "hang" for kind, _, _ in met):
                return met
            time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    backing, mountpoint, faults = map(Path, sys.argv[1:])
    FUSE(
        FaultyFile(backing, faults),
        str(mountpoint),
        foreground=True,
        raw_fi=False,
        direct_io=True,
        big_writes=True,
    )
