"""Which swap areas lie on a disk that is served here: those that its server must outlive.

    zram's disk -> NBD client in the kernel -> /dev/nbdN                            -> swap
    zram's disk -> nbdfuse                  -> file nbd, in a directory's mount     -> /dev/loopN -> swap

Partitions and mapped devices (LVM, dm-crypt) on such a device are not looked through. Nor is an NBD device found that
`nbd-client -nonetlink` has attached and gone into the background with: its pid is not that of the client.

It imports next to nothing: the keeper of an attached device, which has to live in locked memory, uses it too.
"""

import os


class Swap:
    """A swap area, as /proc/swaps lists it. It is on a "partition" or a "file"; its size and use are in bytes."""

    __slots__ = ("kind", "path", "priority", "size", "used")

    def __init__(self, path: str, kind: str, size: int, used: int, priority: int) -> None:
        self.path = path
        self.kind = kind
        self.size = size
        self.used = used
        self.priority = priority


def read_swaps(root: str = "/") -> list[Swap]:
    """Return the swap areas that are in use.

    Raises:
        OSError: the list cannot be read.
    """
    with open(os.path.join(root, "proc/swaps")) as file:
        lines = file.read().splitlines()[1:]
    swaps = []
    for line in lines:
        # In the path, blanks and backslashes are written in octal: from the right, the line is unambiguous.
        path, kind, size, used, priority = line.rsplit(None, 4)
        swaps.append(Swap(unescape(path), kind, int(size) << 10, int(used) << 10, int(priority)))
    return swaps


def swaps_of(uuid: str, peers: set[int], root: str = "/") -> list[str]:
    """Return the paths of the swap areas on the disk with this UUID.

    `peers` are the pids of the NBD clients that are connected to it by a Unix socket (SO_PEERCRED): they find what was
    attached without telling the kernel the UUID. All files are looked for under `root`.

    Raises:
        OSError: the list of swap areas cannot be read.
    """
    devices = [swap.path for swap in read_swaps(root) if swap.kind != "file"]
    return [path for path in devices if _is_on(os.path.basename(path), uuid, peers, root)]


def _is_on(name: str, uuid: str, peers: set[int], root: str) -> bool:
    disk = os.path.join(root, "sys/block", name)
    if name.startswith("nbd"):
        return _read(os.path.join(disk, "backend")) == uuid or _read_pid(os.path.join(disk, "pid")) in peers
    if name.startswith("loop"):
        file = _read(os.path.join(disk, "loop/backing_file")).lstrip("/")
        return bool(file) and _read_pid(os.path.join(root, nbdfuse_pid_file(file))) in peers
    return False


def nbdfuse_pid_file(backing_file: str) -> str:
    """Return where the nbdfuse that a loop device has its file from keeps its pid: beside the mountpoint."""
    return os.path.join(os.path.dirname(os.path.dirname(backing_file)), "nbdfuse.pid")


def _read_pid(path: str) -> int | None:
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _read(path: str) -> str:
    """Return the line in a small file, or nothing where there is no such file: few devices have each of them."""
    try:
        with open(path) as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def unescape(path: str) -> str:
    """Return a path of which a list of the kernel has blanks, newlines and backslashes in octal."""
    first, *rest = path.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
