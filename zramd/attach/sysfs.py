"""A block device as the kernel shows it under /sys and /proc: its attributes, its queue, and who uses it.

It imports next to nothing: the keeper of an attached device, which has to live in locked memory, uses it.
"""

import os

from zramd.attach.swaps import read_swaps, unescape

SECTOR = 512
"""Bytes; sysfs gives sizes in these, whatever the device's own sector is."""


class BlockDevice:
    """The device called `name`, such as nbd0. All files are looked for under `root`."""

    __slots__ = ("_root", "name", "node")

    def __init__(self, name: str, root: str = "/") -> None:
        self.name = name
        self.node = os.path.join(root, "dev", name)
        self._root = root

    @property
    def path(self) -> str:
        """What users call it, such as /dev/nbd0."""
        return f"/dev/{self.name}"

    def file(self, attribute: str) -> str:
        """Return the path of an attribute's file, such as queue/io_timeout's."""
        return os.path.join(self._root, "sys/block", self.name, attribute)

    def read(self, attribute: str) -> str | None:
        """Return an attribute, or None if the device does not have it now."""
        try:
            with open(self.file(attribute)) as file:
                return file.read().rstrip("\n")
        except OSError:
            return None

    def write(self, attribute: str, value: str) -> None:
        """Set an attribute.

        Raises:
            OSError: the device does not have it, or does not take the value.
        """
        # Unbuffered: what the kernel says must be the answer to the write, not to a close.
        fd = os.open(self.file(attribute), os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    @property
    def size(self) -> int:
        """Bytes; 0 if it has none now."""
        return int(self.read("size") or 0) * SECTOR

    def users(self) -> list[str]:
        """Return who uses the device, or a partition of it: "it is mounted on /mnt" and the like.

        Mounts in other mount namespaces are not seen; opening the device for oneself (O_EXCL) finds those too.
        """
        found = [f"{swap.path} is swapped to" for swap in read_swaps(self._root) if self._is_here(swap.path)]
        found += [f"{source} is mounted on {where}" for source, where in self._mounts() if self._is_here(source)]
        found += [f"{holder} is made of it" for holder in self._list("holders")]
        return found

    def place(self) -> str:
        """Return where the device or a partition of it is used: "[SWAP]", a directory, or nothing (as zramctl)."""
        if any(self._is_here(swap.path) for swap in read_swaps(self._root)):
            return "[SWAP]"
        return next((unescape(where) for source, where in self._mounts() if self._is_here(source)), "")

    def _is_here(self, path: str) -> bool:
        """Say whether a path is that of the device or of a partition: /dev/nbd1 or /dev/nbd1p2, but not /dev/nbd12."""
        rest = path.removeprefix(self.path)
        return path.startswith(self.path) and (not rest or rest[0] == "p")

    def _mounts(self) -> list[tuple[str, str]]:
        with open(os.path.join(self._root, "proc/self/mounts")) as file:
            lines = file.read().splitlines()
        return [(fields[0], fields[1]) for fields in map(str.split, lines)]

    def _list(self, attribute: str) -> list[str]:
        try:
            return sorted(os.listdir(self.file(attribute)))
        except OSError:
            return []


def block_devices(prefix: str, root: str = "/") -> list[BlockDevice]:
    """Return the devices whose names are a prefix and a number, by number."""
    names = [name for name in os.listdir(os.path.join(root, "sys/block")) if name.startswith(prefix)]
    names = [name for name in names if name[len(prefix) :].isdecimal()]
    return [BlockDevice(name, root) for name in sorted(names, key=lambda name: int(name[len(prefix) :]))]
