"""The file or block device under a store: whole blocks, past the page cache where the file system allows it.

Page cache would be filled at the very moment at which memory is short, and with what nobody can read.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = 4096
"""Bytes that are read and written together."""
BLKGETSIZE64 = 0x80081272
BLKDISCARD = 0x1277
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class NotBlockError(OSError):
    """The path is neither a file nor a block device."""


class Medium:
    """An open file or block device of `size` bytes that no other store has. Buffers must start at page boundaries."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: it cannot be opened; EBUSY: somebody else has it, ENOTBLK: it is neither file nor block device.
        """
        # O_NONBLOCK: a FIFO must not keep anybody waiting.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
        self._is_file = path.is_file()
        if path.is_block_device():
            flags |= os.O_EXCL
        self.path = path
        self._fd = _open(path, flags)
        self._changed = threading.Condition()
        self._users = 0
        self._closed = False
        try:
            self.size = self._size()
        except OSError:
            os.close(self._fd)
            raise

    def _size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISBLK(mode):
            found = bytearray(8)
            fcntl.ioctl(self._fd, BLKGETSIZE64, found)
            return int.from_bytes(found, "little")
        if not stat.S_ISREG(mode):
            raise NotBlockError(errno.ENOTBLK, "it is neither a file nor a block device", str(self.path))
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(errno.EBUSY, "another zramd has it", str(self.path)) from error
        return os.fstat(self._fd).st_size

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Keep the file open for a moment.

        Raises:
            OSError: it is closed.
        """
        with self._changed:
            if self._closed:
                raise OSError(errno.EBADF, "the backing store is closed", str(self.path))
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._changed:
                self._users -= 1
                self._close_unused()
                self._changed.notify_all()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of whole blocks from an offset.

        Raises:
            OSError: that failed.
        """
        with self._open() as fd:
            count = os.preadv(fd, [buffer], offset)
        if count != len(buffer):
            raise OSError(errno.EIO, f"only {count} of {len(buffer)} bytes could be read", str(self.path))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write a buffer of whole blocks to an offset.

        Raises:
            OSError: that failed, or did so in part.
        """
        with self._open() as fd:
            count = os.pwrite(fd, buffer, offset)
        if count != len(buffer):
            raise OSError(errno.ENOSPC, f"only {count} of {len(buffer)} bytes could be written", str(self.path))

    def discard(self, offset: int, length: int) -> None:
        """Give a part back, if the medium can; what is in it means nothing any more."""
        with suppress(OSError), self._open() as fd:
            if self._is_file:
                _libc.fallocate64(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
            else:
                fcntl.ioctl(fd, BLKDISCARD, offset.to_bytes(8, "little") + length.to_bytes(8, "little"))

    def sync(self) -> None:
        """Wait until what was written is on the medium.

        Raises:
            OSError: it cannot be.
        """
        with self._open() as fd:
            os.fdatasync(fd)

    def close(self, *, wait: bool = True) -> None:
        """Close it as soon as nobody is reading or writing, and `wait` for that. Until then nobody else can have it."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._close_unused()
            if wait:
                self._changed.wait_for(lambda: not self._users)

    def _close_unused(self) -> None:
        if self._closed and not self._users:
            os.close(self._fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def aligned_buffer(size: int) -> memoryview:
    """Return a buffer of whole blocks that O_DIRECT takes."""
    return memoryview(mmap.mmap(-1, size))
