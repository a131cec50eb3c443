"""An export as a block device by the kernel's own NBD client, the shortest way where there is one."""

import contextlib
import logging
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from zramd.attach.attachment import AttachError, Attachment, claim, last_line, require_root
from zramd.attach.keeper import index_of, pid_path
from zramd.attach.module import load_nbd
from zramd.attach.netlink import NbdFamily
from zramd.attach.order import Order
from zramd.attach.pidfile import holder, wait_until_free
from zramd.attach.process import command
from zramd.attach.sysfs import BlockDevice, block_devices
from zramd.paths import make_runtime_directory, runtime_directory

_POLL_SECONDS = 0.02

log = logging.getLogger(__name__)


@dataclass
class NbdDevice(Attachment):
    """An attached export. Made by `attach`, or of any /dev/nbdN."""

    path: Path
    _keeper: subprocess.Popen[str] | None = field(default=None, repr=False)

    @classmethod
    def attach(cls, order: Order) -> Self:
        """Attach the export of an order, and leave a keeper behind that does so again whenever the server is back.

        Raises:
            AttachError: it cannot be attached.
        """
        require_root()
        load_nbd()
        order.runtime = str(make_runtime_directory())
        # A session of its own: Ctrl-C on the terminal must not reach the keeper.
        keeper = subprocess.Popen(
            command(order),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # Both end when the keeper does, or goes into the background; neither has more to say than a pipe holds.
            path, complaint = (_read_all(stream) for stream in (keeper.stdout, keeper.stderr))
        except BaseException:
            keeper.terminate()
            keeper.wait()
            raise
        if not path:
            keeper.wait()
            raise AttachError(last_line(complaint).removeprefix("Error: "))
        for line in complaint.splitlines():
            log.warning(line.removeprefix("zramd: "))
        return cls(Path(path), keeper)

    def detach(self, timeout: float = 10.0) -> None:
        """Disconnect the device. May be called more than once.

        Raises:
            InUseError: the device is mounted or swapped to. Nothing was undone.
            AttachError: the kernel does not let go of it.
        """
        device = BlockDevice(self.path.name)
        if device.read("pid") is not None:
            fd = claim(self.path)
            try:
                disconnect(device)
            finally:
                os.close(fd)
        deadline = time.monotonic() + timeout
        while device.read("pid") is not None:
            if time.monotonic() > deadline:
                raise AttachError(f"{self.path} is still open somewhere: close it and detach again")
            time.sleep(_POLL_SECONDS)
        self._wait_for_keeper(max(deadline - time.monotonic(), 1))

    def _wait_for_keeper(self, seconds: float) -> None:
        """Wait until the keeper has noticed, so that the device can be attached anew."""
        pid_file = pid_path(str(runtime_directory()), self.path.name)
        keeper = holder(pid_file)
        if keeper is not None:
            # It wakes it up. Whoever holds a pid file lives, so this is no other process.
            os.kill(keeper, signal.SIGCHLD)
        if not wait_until_free(pid_file, seconds):
            raise AttachError(f"{self.path} is detached, but process {keeper} that kept it does not end: kill {keeper}")
        if self._keeper is not None:
            self._keeper.wait()
        # A keeper that was killed has left it.
        order = Order.load(str(runtime_directory()), self.path.name)
        if order is not None:
            order.forget()


def _read_all(stream: IO[str] | None) -> str:
    if stream is None:
        return ""
    with stream:
        return stream.read().strip()


def disconnect(device: BlockDevice) -> None:
    """Disconnect an NBD device that nobody uses.

    Raises:
        AttachError: the kernel refuses.
    """
    try:
        with contextlib.closing(NbdFamily.open()) as family:
            family.disconnect(index_of(device.name))
    except OSError as error:
        raise AttachError(f"cannot disconnect {device.path}: {error.strerror}") from error


def attached_nbd_devices() -> list[Path]:
    """Return the NBD devices that zramd has attached."""
    runtime = str(runtime_directory())
    devices = [device for device in block_devices("nbd") if device.read("backend")]
    return [Path(device.path) for device in devices if os.path.exists(pid_path(runtime, device.name))]
