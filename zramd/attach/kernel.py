"""An export as a block device by the kernel's own NBD client, the shortest way where there is one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from zramd.attach.attachment import AttachError, Attachment, find_tool, require_root, require_unused, run_tool
from zramd.layout import PAGE_SIZE


def has_nbd() -> bool:
    """Say whether the kernel has an NBD client, loaded or as a module that can be loaded."""
    if Path("/sys/module/nbd").exists():
        return True
    try:
        run_tool([find_tool("modprobe", "kmod"), "--dry-run", "--quiet", "nbd"])
    except AttachError:
        return False
    return True


@dataclass(frozen=True)
class NbdDevice(Attachment):
    """An attached export. Made by `attach`."""

    path: Path

    @classmethod
    def attach(cls, socket: Path) -> Self:
        """Attach the export at a Unix socket to the first free /dev/nbdN.

        Raises:
            AttachError: it cannot be attached.
        """
        require_root()
        client = find_tool("nbd-client", "nbd-client")
        if not Path("/sys/module/nbd").exists():
            run_tool([find_tool("modprobe", "kmod"), "nbd"])
        for disk in sorted(Path("/sys/block").glob("nbd*")):
            device = cls(Path("/dev") / disk.name)
            if not device._is_connected():
                try:
                    run_tool([client, "-unix", socket, device.path, "-b", str(PAGE_SIZE)])
                except BaseException:
                    device.detach()
                    raise
                return device
        raise AttachError("every /dev/nbdN is taken: disconnect one with nbd-client -d")

    def detach(self, timeout: float = 10.0) -> None:
        """Disconnect the device. May be called more than once.

        Raises:
            InUseError: the device is mounted or swapped to. Nothing was undone.
            AttachError: the kernel does not let go of it.
        """
        if self._is_connected():
            require_unused(self.path)
            run_tool([find_tool("nbd-client", "nbd-client"), "-d", self.path])
        deadline = time.monotonic() + timeout
        while self._is_connected():
            if time.monotonic() > deadline:
                raise AttachError(f"{self.path} is still open somewhere: close it and detach again")
            time.sleep(0.02)

    def _is_connected(self) -> bool:
        # The kernel shows a pid for as long as a device has a connection.
        return (Path("/sys/block") / self.path.name / "pid").exists()
