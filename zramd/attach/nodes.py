"""The block devices of this machine that a disk is attached as. Anybody may look."""

import os
from urllib.parse import quote

from zramd.attach.sysfs import BlockDevice, block_devices

UNIX = "nbd+unix:///?socket="
"""The URI of a server's default export, before the path of its socket."""
MOUNTED = "/export/nbd"
"""How the path of the file ends that `zramd attach --fuse` makes a loop device of."""


def nodes(uuid: str | None, uris: list[str], root: str = "/") -> list[BlockDevice]:
    """Return the devices that the disk of this UUID, served at these URIs, is attached as.

    Those that `zramd attach` has made are found. What `nbd-client` attaches has no UUID.
    """
    if not os.path.isdir(os.path.join(root, "sys/block")):
        return []
    found = [device for device in block_devices("nbd", root) if uuid and device.read("backend") == uuid]
    for device in block_devices("loop", root):
        file = device.read("loop/backing_file") or ""
        if file.endswith(MOUNTED) and _export(file, root) in uris:
            found.append(device)
    return found


def _export(file: str, root: str) -> str | None:
    """Return the URI that the nbdfuse was told which shows an export as this file. Its pid file is for its owner."""
    for pid in os.listdir(os.path.join(root, "proc")):
        if pid.isdecimal():
            try:
                with open(os.path.join(root, "proc", pid, "cmdline"), errors="surrogateescape") as command:
                    words = command.read().split("\0")
            except OSError:
                continue  # it has ended, or is hidden (hidepid)
            if file in words:
                return UNIX + quote(words[-2]) if "--unix" in words else words[-2]
    return None
