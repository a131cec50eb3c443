"""Where sockets and regions lie when nothing else is asked for."""

import errno
import os
import stat
from pathlib import Path

from zramd.memory import is_memory_backed

DEVICE_NAME = "zram0"
STATUS_SUFFIX = ".status"
ADMIN_SUFFIX = ".admin"
SYSTEM = Path("/run/zramd")
"""Of servers that root started, and, in directories of their own, those that systemd did."""
CONFIGURATIONS = ("run/zramd", "etc/zramd", "usr/local/lib/zramd", "usr/lib/zramd")
"""Directories below the root of the machine, an earlier one before a later one."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (used only through private_directory)


def runtime_directory() -> Path:
    """Return the directory for sockets: that of a systemd unit, /run/zramd for root, else the user's own.

    Raises:
        OSError: the user's runtime directory cannot be looked at.
    """
    unit = os.environ.get("RUNTIME_DIRECTORY")
    if unit:
        return Path(unit.partition(":")[0])
    if os.geteuid() == 0:
        return SYSTEM
    given = os.environ.get("XDG_RUNTIME_DIR")
    candidate = Path(given) if given else Path(f"/run/user/{os.geteuid()}")
    return candidate / "zramd" if candidate.is_dir() else _shared_memory_directory()


def make_runtime_directory() -> Path:
    """Return the directory for sockets, made if it was not there.

    Raises:
        OSError: it cannot be made, or is not private where it must be.
    """
    runtime = runtime_directory()
    if runtime == _shared_memory_directory():
        private_directory(runtime)
    else:
        runtime.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, exist_ok=True)
    return runtime


def state_directory(name: str) -> Path:
    """Return the directory for a disk's regions: in the runtime directory if that is in memory, else under /dev/shm.

    Raises:
        OSError: neither can be used.
    """
    runtime = make_runtime_directory()
    if is_memory_backed(runtime):
        return runtime / name
    shared = _shared_memory_directory()
    private_directory(shared)
    return shared / name


def private_directory(path: Path) -> None:
    """Make a directory that only its owner may enter, or check that it is one.

    Raises:
        OSError: it is somebody else's, or open to others.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise OSError(errno.EACCES, f"{path} must be a directory of yours with mode 0700")


def server_sockets(suffix: str) -> list[Path]:
    """Return the sockets (`.status` or `.admin`) on which a server of this user, or of the system, may answer."""
    directories = dict.fromkeys((runtime_directory(), SYSTEM, *sorted(SYSTEM.glob("*/"))))
    return [path for directory in directories for path in sorted(directory.glob(f"*{suffix}"))]


def _shared_memory_directory() -> Path:
    return SHARED_MEMORY / f"zramd-{os.geteuid()}"
