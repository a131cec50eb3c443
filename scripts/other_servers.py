"""The servers that zramd is compared with: others of NBD, and the kernel's zram."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from harness import STOP_SECONDS, Interrupt, StepError
from kernel_build import CONTROL, KernelZram, SkippedError
from peers import NbdPeer, Peer, Zramd

from zramd.native import Engine


class Nbdkit(NbdPeer):
    """nbdkit's memory plugin: `malloc` does not compress, `zstd` does, in pages of 32 KiB."""

    program = package = "nbdkit"

    def __init__(self, directory: Path, size: int, allocator: str) -> None:
        super().__init__(f"nbdkit {allocator}", directory, size)
        self._allocator = allocator

    def _command(self) -> list[str]:
        return ["nbdkit", "-f", "-U", str(self.socket), "memory", str(self.size), f"allocator={self._allocator}"]


class FilePeer(NbdPeer):
    """A server of a file, which is on a tmpfs."""

    def __init__(self, directory: Path, size: int) -> None:
        super().__init__(self.program, directory, size)
        self._file = self._path.with_suffix(".img")

    def launch(self) -> None:
        """Start it, with an empty file."""
        with self._file.open("wb") as file:
            file.truncate(self.size)
        super().launch()

    def memory(self) -> int:
        """Return the resident memory of its process, and the file's."""
        return super().memory() + self.stored()

    def stored(self) -> int:
        """Return what the file takes."""
        return self._file.stat().st_blocks * 512


class QemuNbd(FilePeer):
    """qemu-nbd, which gives discarded blocks of the file back as zramd does."""

    program = "qemu-nbd"
    package = "qemu-utils"

    def _command(self) -> list[str]:
        served = ["--format=raw", "--discard=unmap", str(self._file)]
        return ["qemu-nbd", "--persistent", "--shared=16", f"--socket={self.socket}", *served]


class NbdServer(FilePeer):
    """nbd-server, which has a process for each connection."""

    program = package = "nbd-server"
    export = "disk"

    def _command(self) -> list[str]:
        config = self._path.with_suffix(".conf")
        config.write_text(f"[generic]\nunixsock = {self.socket}\n[disk]\nexportname = {self._file}\ntrim = true\n")
        return ["nbd-server", "-C", str(config), "-p", str(self._pid_file)]

    @property
    def _pid_file(self) -> Path:
        return self._path.with_suffix(".pid")

    @property
    def pid(self) -> int:
        """The process that it leaves in the background."""
        return int(self._pid_file.read_text())

    def _alive(self) -> bool:
        return self._process is not None and not self._process.poll()

    def stop(self) -> None:
        """Stop what it left in the background."""
        super().stop()
        if self._pid_file.exists():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def cpu(self) -> float | None:
        """Return the CPU seconds of its process, when those of its connections have ended and are counted in it."""
        deadline = time.monotonic() + STOP_SECONDS
        while any(_session(pid) == self.pid != pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))):
            if time.monotonic() > deadline:
                raise StepError(f"{self.name} still has clients after {STOP_SECONDS} s")
            time.sleep(0.005)
        return super().cpu()

    def version(self) -> str:
        """Return what it says, which is no success to it."""
        return subprocess.run(["nbd-server", "-V"], capture_output=True, text=True).stdout.partition("\n")[0]


def _session(pid: int) -> int:
    """Return the session of a process; 0 if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


class KernelPeer(Peer):
    """The kernel's zram with lz4: a block device whose work is done by who reads and writes."""

    def __init__(self, directory: Path, size: int) -> None:
        super().__init__("kernel zram lz4", directory, size)
        self._zram: KernelZram | None = None

    def start(self, interrupt: Interrupt) -> None:
        """Add a device."""
        interrupt.check()
        if not CONTROL.exists():
            raise SkippedError("there is no kernel zram: modprobe zram")
        if os.geteuid() != 0:
            raise SkippedError("a device of kernel zram needs root")
        self._zram = KernelZram()
        self._zram.set_up(self.size, "lz4")

    def stop(self) -> None:
        """Take the device away."""
        if self._zram is not None:
            self._zram.remove()

    @property
    def _device(self) -> KernelZram:
        if self._zram is None:
            raise StepError(f"{self.name} was not started")
        return self._zram

    def fio(self) -> list[str]:
        """Return the options of asynchronous I/O past the page cache."""
        return ["--ioengine=libaio", "--direct=1", f"--filename={self._device.path}"]

    def write_command(self, source: Path, block: int) -> list[str]:
        """Return a command of dd: nbdcopy would write to the page cache."""
        target = [f"of={self._device.path}", "oflag=direct", "conv=notrunc"]
        return ["dd", f"if={source}", *target, f"bs={block}", "status=none"]

    def read_command(self) -> list[str]:
        """Return a command of dd."""
        return ["dd", f"if={self._device.path}", "iflag=direct", "bs=1M", "status=none"]

    def cpu(self) -> float | None:
        """Return nothing: there is no server."""
        return None

    def memory(self) -> int:
        """Return mem_used_total."""
        return self._device.mm_stat().mem_used_total

    def stored(self) -> int:
        """Return orig_data_size."""
        return self._device.mm_stat().orig_data_size

    def version(self) -> str:
        """Return that of the kernel."""
        return f"Linux {os.uname().release}"


def all_peers(directory: Path, size: int) -> list[Peer]:
    """Return every server, in the order of the tables."""
    return [
        *(
            Zramd(directory, size, engine, algorithm)
            for engine in (Engine.NATIVE, Engine.PYTHON)
            for algorithm in ("lz4", "zstd")
        ),
        *(Nbdkit(directory, size, allocator) for allocator in ("malloc", "zstd")),
        QemuNbd(directory, size),
        NbdServer(directory, size),
        KernelPeer(directory, size),
    ]
