"""The file that says which process keeps a device: its pid, locked for as long as that process lives."""

import fcntl
import os
import time

_POLL_SECONDS = 0.02


class TakenError(Exception):
    """Another process has the file."""


class PidFile:
    """The pid file of this process; it goes with `remove`, and is worth nothing once the process has ended."""

    def __init__(self, path: str, seconds: float) -> None:
        """Take the file, waiting up to so many seconds for a process that is about to end.

        Raises:
            TakenError: a process that lives has it.
            OSError: it cannot be made.
        """
        deadline = time.monotonic() + seconds
        while (fd := _take(path)) is None:
            if time.monotonic() > deadline:
                raise TakenError(f"process {holder(path)} has {path}")
            time.sleep(_POLL_SECONDS)
        self._path, self._fd = path, fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def remove(self) -> None:
        """Give the file up."""
        os.unlink(self._path)
        os.close(self._fd)


def is_held(path: str) -> bool:
    """Say whether a process has a pid file."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd)
    finally:
        os.close(fd)


def holder(path: str) -> int | None:
    """Return the pid of the process that has a pid file, or None if there is no such process."""
    if not is_held(path):
        return None
    try:
        with open(path) as file:
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return None  # just removed, or not yet written


def wait_until_free(path: str, seconds: float) -> bool:
    """Wait up to so many seconds until no process has a pid file; say whether that came."""
    deadline = time.monotonic() + seconds
    while is_held(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _take(path: str) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    # Its owner may have removed the file while it was opened here.
    if _lock(fd) and _is_at(fd, path):
        return fd
    os.close(fd)
    return None


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
