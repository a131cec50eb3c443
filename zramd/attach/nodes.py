"""The block devices of this machine that a disk is attached as. Anybody may look."""

import os
from urllib.parse import quote

from zramd.attach.swaps import nbdfuse_pid_file
from zramd.attach.sysfs import BlockDevice, block_devices

UNIX = "nbd+unix:///?socket="
"""The URI of a server's default export, before the path of its socket."""


def nodes(uuid: str | None, uris: list[str], root: str = "/") -> list[BlockDevice]:
    """Return the devices that the disk of this UUID, served at these URIs, is attached as.

    Those that `zramd attach` has made are found. What `nbd-client` attaches has no UUID.
    """
    if not os.path.isdir(os.path.join(root, "sys/block")):
        return []
    found = [device for device in block_devices("nbd", root) if uuid and device.read("backend") == uuid]
    return found + [device for device in block_devices("loop", root) if _export(device, root) in uris]


def _export(device: BlockDevice, root: str) -> str | None:
    """Return the URI that the nbdfuse of a loop device was told."""
    backing = (device.read("loop/backing_file") or "").lstrip("/")
    if not backing:
        return None
    try:
        with open(os.path.join(root, nbdfuse_pid_file(backing))) as file:
            pid = file.read().strip()
        with open(os.path.join(root, "proc", pid, "cmdline")) as file:
            words = file.read().split("\0")
    except OSError:
        return None
    return UNIX + quote(words[-2]) if "--unix" in words else words[-2] if len(words) > 1 else None
