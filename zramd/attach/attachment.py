"""What the ways to attach an export have in common: what they give, what can be wrong, and how they run tools."""

import errno
import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from zramd.attach.sysfs import BlockDevice

# Root by `su` has no sbin on its PATH, and losetup lies there.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class AttachError(Exception):
    """An export could not be attached or detached; the message says why and what to do."""


class MissingToolError(AttachError):
    """A program that attaching needs is not installed."""


class NotRootError(AttachError):
    """The caller may not make block devices."""


class InUseError(AttachError):
    """The device is mounted or swapped to, so it cannot go away."""


class Attachment(ABC):
    """An attached export; as a context manager it detaches at the end."""

    @abstractmethod
    def detach(self) -> None:
        """Undo the attach. May be called more than once.

        Raises:
            AttachError: it could not be undone.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def require_root() -> None:
    """Check that the caller may make block devices.

    Raises:
        NotRootError: it may not.
    """
    if os.geteuid() != 0:
        raise NotRootError("block devices and swap are for root: run this again with sudo")


def claim(device: Path) -> int:
    """Open `device` so that nobody can mount it or swap to it until the descriptor is closed.

    Detaching would not fail for a device that is in use: a loop device waits for its user, an NBD device fails its
    user's I/O.

    Raises:
        InUseError: somebody uses it.
        AttachError: it cannot be opened.
    """
    try:
        return os.open(device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise AttachError(f"cannot open {device}: {error.strerror}") from error
        users = ", ".join(BlockDevice(device.name).users()) or error.strerror
        raise InUseError(f"{device} is in use ({users}): unmount it or swapoff first") from error


def require_unused(device: Path) -> None:
    """Check that nobody has mounted `device` or swaps to it.

    Raises:
        InUseError: somebody does.
    """
    os.close(claim(device))


def find_tool(name: str, package: str) -> str:
    """Find the program `name`.

    Raises:
        MissingToolError: it is not there, and `package` is what Debian has it in.
    """
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise MissingToolError(f"{name} is not installed: apt-get install {package}")
    return found


def run_tool(command: list[str | Path]) -> str:
    """Run `command` and return what it printed.

    It gets a session of its own: Ctrl-C on the terminal must not stop an attach or a detach half-way.

    Raises:
        AttachError: it failed; the message ends with the last line of what it said.
    """
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    if result.returncode != 0:
        raise AttachError(f"{Path(command[0]).name} failed: {last_line(result.stderr)}")
    return result.stdout.strip()


def last_line(text: str) -> str:
    """Return the last line that says anything: where a failing tool puts its reason."""
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
