"""An export as a block device where the kernel has no NBD client: nbdfuse and a loop device.

Containers and small virtual machines often have FUSE and loop devices but no nbd module. Direct I/O keeps the
page cache from holding a second, uncompressed copy of everything the device stores.
"""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from zramd.attach.attachment import (
    AttachError,
    Attachment,
    MissingToolError,
    find_tool,
    last_line,
    require_root,
    require_unused,
    run_tool,
)
from zramd.attach.swaps import nbdfuse_pid_file
from zramd.attach.sysfs import BlockDevice, block_devices
from zramd.layout import PAGE_SIZE

_POLL_SECONDS = 0.02


class NoFuseError(AttachError):
    """The kernel offers no FUSE."""


class NoFreeLoopError(AttachError):
    """The kernel has no loop device to give."""


@dataclass
class LoopDevice(Attachment):
    """An attached export. Made by `attach`.

    Only the directory is remembered; what is attached is read off the kernel. So `detach` undoes whatever
    there is, wherever an attach or an earlier detach was cut short.
    """

    directory: Path
    _nbdfuse: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @classmethod
    def attach(cls, export: Path | str, parent: Path | None = None, timeout: float = 10.0) -> Self:
        """Attach the export at a Unix socket (a `Path`) or at an NBD URI (a `str`).

        What it takes lies in a directory of its own in `parent`, by default that for temporary files.

        Raises:
            AttachError: it cannot be attached, and nothing is left behind.
        """
        _require_machine()
        # The kernel reports backing files with symbolic links resolved, and _loops compares with that.
        device = cls(Path(tempfile.mkdtemp(prefix="zramd-loop-", dir=parent)).resolve())
        try:
            device._mount(export, timeout)
            device._set_up_loop()
        except BaseException as error:
            try:
                device.detach()
            except AttachError as left:
                error.add_note(str(left))
            raise
        return device

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the attachment that gave the loop device at a path, whoever made it.

        Raises:
            AttachError: none did.
        """
        backing = BlockDevice(path.name).read("loop/backing_file") or ""
        if not backing or not os.path.exists(nbdfuse_pid_file(backing)):
            raise AttachError(f"{path} is no loop device that zramd attach has made: use losetup -d")
        return cls(Path(nbdfuse_pid_file(backing)).parent)

    @property
    def path(self) -> Path:
        """The block device, such as /dev/loop0.

        Raises:
            AttachError: it is detached.
        """
        for loop in self._loops():
            return loop
        raise AttachError("the loop device is detached: attach the export again")

    def detach(self, timeout: float = 10.0) -> None:
        """Undo the attach. May be called at any time and more than once.

        Raises:
            InUseError: the device is mounted or swapped to. Nothing was undone.
            AttachError: a part could not be undone. The next call takes up from there.
        """
        deadline = time.monotonic() + timeout
        for loop in self._loops():
            require_unused(loop)
            run_tool([find_tool("losetup", "mount"), "--detach", loop])
        # losetup does not wait until the kernel lets go of a device that somebody, say udev, still has open.
        while loops := self._loops():
            _wait_until(deadline, f"{loops[0]} is still open somewhere: close it and detach again")
        self._unmount(deadline)
        self._end_nbdfuse(deadline)
        # An nbdfuse that was stopped while it started may have mounted after the first look.
        self._unmount(deadline)
        self._remove_directory()

    @property
    def _mountpoint(self) -> Path:
        return self.directory / "export"

    @property
    def _pid_file(self) -> Path:
        return self.directory / "nbdfuse.pid"

    @property
    def _log(self) -> Path:
        return self.directory / "nbdfuse.log"

    def _mount(self, export: Path | str, timeout: float) -> None:
        self._mountpoint.mkdir()
        command: list[str | Path] = [find_tool("nbdfuse", "libnbd-bin"), "-P", self._pid_file]
        command += [self._mountpoint / "nbd"]
        command += ["--unix", export] if isinstance(export, Path) else [export]
        with self._log.open("wb") as log:
            # A session of its own, or Ctrl-C would pull the file away from under the loop device.
            self._nbdfuse = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout
        while not self._pid_file.exists():
            if self._nbdfuse.poll() is not None:
                reason = last_line(self._log.read_text(errors="replace"))
                if "nbd_set_uri_allow_local_file" in reason:
                    reason = "it takes certificates from /etc/pki/libnbd (~/.pki/libnbd of others than root) only"
                elif "TLS" in reason:
                    reason += " Its certificates are those in /etc/pki/libnbd"
                raise AttachError(f"nbdfuse cannot attach {export}: {reason}")
            _wait_until(deadline, f"{export} did not answer within {timeout:g} s: is the server running?")

    def _set_up_loop(self) -> None:
        # Sectors of a page, as zram has them: the server would have to read before it writes a smaller one.
        options = ["--find", "--direct-io=on", f"--sector-size={PAGE_SIZE}"]
        try:
            run_tool([find_tool("losetup", "mount"), *options, self._mountpoint / "nbd"])
        except MissingToolError:
            raise
        except AttachError as error:
            if "cannot find an unused loop device" in str(error):
                raise NoFreeLoopError("every loop device is taken: detach one with losetup -d") from error
            raise

    def _loops(self) -> list[Path]:
        loops = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                file = Path(backing.read_text().rstrip("\n"))
            except OSError:
                continue  # detached since it was listed
            if file.is_relative_to(self.directory):
                loops.append(Path("/dev") / backing.parent.parent.name)
        return loops

    def _unmount(self, deadline: float) -> None:
        while self._is_mounted():
            try:
                run_tool([find_tool("fusermount3", "fuse3"), "-u", self._mountpoint])
            except MissingToolError:
                raise
            except AttachError as error:
                # A loop device lets go of its file a moment after it is gone from /sys.
                _wait_until(deadline, str(error))

    def _is_mounted(self) -> bool:
        # The kernel's list, not stat: that fails on a mount whose nbdfuse is dead.
        name = str(self._mountpoint).replace("\\", "\\134").replace(" ", "\\040")
        with open("/proc/self/mountinfo") as mounts:
            return any(line.split()[4] == name for line in mounts)

    def _end_nbdfuse(self, deadline: float) -> None:
        if self._nbdfuse is None:
            self._wait_for_nbdfuse(deadline)
            return
        # Unmounted, it ends by itself; one that never came to mount has nothing to lose.
        if not self._pid_file.exists():
            self._nbdfuse.terminate()
        try:
            self._nbdfuse.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            self._nbdfuse.kill()
            self._nbdfuse.wait()

    def _wait_for_nbdfuse(self, deadline: float) -> None:
        """Wait until an nbdfuse that is not this process's child has left the server."""
        pid = self._pid_file.read_text().strip() if self._pid_file.exists() else ""
        while pid and _is_nbdfuse(Path("/proc", pid, "comm")):
            _wait_until(deadline, f"nbdfuse does not end: kill {pid} and detach again")

    def _remove_directory(self) -> None:
        # Not a recursive removal: that would reach into an export that is still mounted.
        if self._mountpoint.exists():
            self._mountpoint.rmdir()
        self._pid_file.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        if self.directory.exists():
            self.directory.rmdir()


def _require_machine() -> None:
    require_root()
    find_tool("nbdfuse", "libnbd-bin")
    find_tool("fusermount3", "fuse3")
    find_tool("losetup", "mount")
    if not Path("/dev/fuse").exists():
        raise NoFuseError("there is no /dev/fuse: modprobe fuse, or give it to the container")
    if not Path("/dev/loop-control").exists():
        raise NoFreeLoopError("there is no /dev/loop-control: modprobe loop, or give it to the container")


def _is_nbdfuse(comm: Path) -> bool:
    try:
        return comm.read_text() == "nbdfuse\n"
    except OSError:
        return False  # it has ended


def attached_loop_devices() -> list[Path]:
    """Return the loop devices that zramd has attached."""
    found = []
    for device in block_devices("loop"):
        backing = device.read("loop/backing_file")
        if backing and os.path.exists(nbdfuse_pid_file(backing)):
            found.append(Path(device.path))
    return found


def _wait_until(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise AttachError(complaint)
    time.sleep(_POLL_SECONDS)
