"""What demo and kernel-build share: the steps of a Linux build that a signal can end, and undoing all of it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

from zramd.attach.attachment import AttachError
from zramd.attach.kernel import NbdDevice
from zramd.attach.loop import LoopDevice
from zramd.attach.module import has_nbd
from zramd.attach.order import Order
from zramd.device.counters import MmStat
from zramd.status.client import StatusError, ask

TARBALL = Path("/usr/src/linux-source-6.1.tar.xz")
READY_SECONDS = 20
STOP_SECONDS = 10


class StepError(Exception):
    """A step failed; the message says which and why."""


class InterruptError(Exception):
    """A signal asked to end."""


ERRORS = (InterruptError, StepError, AttachError, StatusError, OSError)
"""What is shown in a line, without a traceback."""


@dataclass(frozen=True)
class Sample:
    """What the daemon held at one moment."""

    mm_stat: MmStat
    resident: int

    @property
    def mm_stat_line(self) -> str:
        """The nine numbers as zram prints them."""
        return " ".join(str(value) for value in asdict(self.mm_stat).values())


@dataclass
class Interrupt:
    """Remembers the first signal that asks to end. The steps look at it, so nothing is cut off half-done."""

    signal: int = 0

    def listen(self) -> None:
        """Take over the signals of Ctrl-C, kill and a closed terminal."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def check(self) -> None:
        """Raise InterruptError if a signal came."""
        if self.signal:
            raise InterruptError(f"ended by {signal.Signals(self.signal).name}")


class Display:
    """The progress: one line that is kept up to date on a terminal, else a line a step and one a while."""

    QUIET_SECONDS = 15

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._last = 0.0

    def progress(self, line: str) -> None:
        """Show how far a step is."""
        now = time.monotonic()
        if self._live and now - self._last >= 0.2:
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[: columns - 1]}", end="", flush=True)
            self._last = now
        elif not self._live and now - self._last >= self.QUIET_SECONDS:
            print(f"  ... {line}", flush=True)
            self._last = now

    def line(self, line: str) -> None:
        """Show a line that stays."""
        print(f"\r\033[K{line}" if self._live else line, flush=True)
        self._last = time.monotonic()


@dataclass
class Server:
    """A zramd daemon with a fresh volatile device."""

    socket: Path
    status: Path
    log: Path
    process: subprocess.Popen[bytes]
    peak: Sample | None = None

    @classmethod
    def start(cls, directory: Path, *options: str) -> Self:
        """Start the daemon, with its sockets in `directory`."""
        return cls.launch(
            directory, "--volatile", *options, "--unix", directory / "zramd.nbd", "--status", directory / "zramd.status"
        )

    @classmethod
    def launch(cls, directory: Path, *options: str | Path) -> Self:
        """Start the daemon with options that put its sockets, zramd.nbd and zramd.status, into `directory`."""
        nbd, status, log = directory / "zramd.nbd", directory / "zramd.status", directory / "zramd.log"
        command: list[str | Path] = [sys.executable, "-m", "zramd", "serve", *options]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C must not stop it while it is mounted.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return cls(nbd, status, log, process)

    def wait_ready(self, interrupt: Interrupt) -> None:
        """Wait until the daemon serves both sockets."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            interrupt.check()
            self.require_alive()
            with contextlib.suppress(StatusError):
                if self.socket.exists():
                    self.mm_stat()
                    return
            if time.monotonic() > deadline:
                raise StepError(f"zramd did not serve within {READY_SECONDS} s: {last_lines(self.log, 1)}")
            time.sleep(0.05)

    def require_alive(self) -> None:
        """Check that the daemon has not ended."""
        if self.process.poll() is not None:
            raise StepError(f"zramd ended with status {self.process.returncode}: {last_lines(self.log, 1)}")

    def mm_stat(self) -> MmStat:
        """Ask the daemon for its counters."""
        return parse_mm_stat(ask(self.status, "mm_stat"))

    def memory(self, name: str) -> int:
        """Return a field of the daemon's /proc/PID/status (VmRSS, VmHWM) in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        if found is None:
            raise StepError(f"the daemon's process has no {name}")
        return int(found[1]) * 1024

    def sample(self) -> Sample:
        """Look at the daemon, and remember the moment when it held the most data."""
        try:
            sample = Sample(self.mm_stat(), self.memory("VmRSS"))
        except (StatusError, OSError) as error:
            # A socket that was closed is seen sooner than the end of the process that had it open.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.require_alive()
            raise StepError(str(error)) from error
        if self.peak is None or sample.mm_stat.orig_data_size >= self.peak.mm_stat.orig_data_size:
            self.peak = sample
        return sample

    def summary(self) -> str:
        """Look at the daemon, and return the numbers of a progress line."""
        sample = self.sample()
        return f"{stored(sample.mm_stat)}, {mib(sample.resident)} resident"

    def stop(self) -> None:
        """End the daemon, and by force if it does not listen."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise StepError(f"zramd did not end within {STOP_SECONDS} s of SIGINT and was killed") from None


@dataclass
class Steps:
    """Commands that run one after the other. `watch` says what the device holds, and raises when it is gone."""

    directory: Path
    interrupt: Interrupt
    display: Display
    watch: Callable[[], str]
    times: dict[str, float] = field(default_factory=dict)

    def step(self, title: str, command: list[str | Path]) -> None:
        """Run `command` with progress, take its time, and end it with all its children on a signal."""
        self.interrupt.check()
        log = self.directory / "step.log"
        started = time.monotonic()
        with log.open("wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        try:
            while process.poll() is None:
                self.interrupt.check()
                self.display.progress(f"{title}: {time.monotonic() - started:.0f} s, {self.watch()}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                end_group(process)
        seconds = time.monotonic() - started
        # A daemon that died is the reason, the I/O error that followed is not.
        held = self.watch()
        if process.returncode != 0:
            raise StepError(f"{title} failed with status {process.returncode}:\n{last_lines(log, 5)}")
        self.times[title] = seconds
        self.display.line(f"{title}: {seconds:.1f} s, {held}")

    def mount(self, title: str, device: Path, mountpoint: Path) -> None:
        """Mount `device` so that what is deleted is discarded."""
        self.step(title, ["mount", "-o", "discard,noatime", device, mountpoint])

    def make_ext4(self, device: Path, mountpoint: Path) -> None:
        """Make a file system on a fresh device, and mount it."""
        # The device dies with the daemon, so a journal would protect nothing. It is fresh and reads as zeros, so
        # the inode tables need not be zeroed, now or in the background.
        layout = ["-q", "-m", "0", "-O", "^has_journal", "-E", "assume_storage_prezeroed=1"]
        self.step("make ext4", ["mkfs.ext4", *layout, device])
        self.mount("mount", device, mountpoint)

    def build_linux(self, tree: Path, config: str = "tinyconfig") -> None:
        """Unpack Linux to the directory `tree`, which it makes, and compile it there."""
        jobs = len(os.sched_getaffinity(0))
        tree.mkdir()
        self.step("unpack Linux", ["tar", "-C", tree, "--strip-components=1", "-xf", TARBALL])
        # Else the page cache hides what the device takes, and the compiler pays for it.
        self.step("write it back", ["sync", "-f", tree])
        self.step("configure", ["make", "-C", tree, config])
        self.step(f"compile (-j{jobs})", ["make", "-C", tree, f"-j{jobs}"])


def parse_mm_stat(text: str) -> MmStat:
    """Return the counters in the text of mm_stat."""
    return MmStat(*(int(value) for value in text.split()))


def ratio(stat: MmStat) -> float:
    """Return how many bytes of data one byte of memory holds."""
    return stat.orig_data_size / max(stat.mem_used_total, 1)


def stored(stat: MmStat) -> str:
    """Return what a device holds, for a progress line."""
    return f"{mib(stat.orig_data_size)} stored in {mib(stat.mem_used_total)} (ratio {ratio(stat):.2f})"


def mib(size: int) -> str:
    """Return a size in MiB."""
    return f"{size / 2**20:,.0f} MiB"


def last_lines(log: Path, count: int) -> str:
    """Return the end of what a program said."""
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-count:]) or "it said nothing"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a step's command and its children, and by force those that do not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def make_directory(undo: contextlib.ExitStack, name: str) -> tuple[Path, Path]:
    """Make a directory with a mountpoint in it, and return both."""
    directory = Path(tempfile.mkdtemp(prefix=f"zramd-{name}-"))
    mountpoint = directory / "mnt"
    undo.callback(remove, directory, mountpoint)
    mountpoint.mkdir()
    return directory, mountpoint


def remove(directory: Path, mountpoint: Path) -> None:
    """Remove a directory, but never what is mounted in it."""
    if mountpoint.is_mount():
        raise StepError(f"{directory} is left: unmount {mountpoint}, then remove it")
    shutil.rmtree(directory)


def serve(
    undo: contextlib.ExitStack, directory: Path, interrupt: Interrupt, *options: str
) -> tuple[Server, NbdDevice | LoopDevice]:
    """Start a daemon, and make its export a block device, in the best way that the machine has."""
    server = Server.start(directory, *options)
    undo.callback(server.stop)
    server.wait_ready(interrupt)
    device = NbdDevice.attach(Order([str(server.socket)], "")) if has_nbd() else LoopDevice.attach(server.socket)
    undo.callback(device.detach)
    return server, device


def unmount_at_end(undo: contextlib.ExitStack, mountpoint: Path, display: Display) -> None:
    """Have what will be mounted unmounted."""
    undo.callback(unmount, mountpoint)
    # Seconds, when there is much left to write back.
    undo.callback(display.line, "unmounting, detaching, stopping")


def unmount(mountpoint: Path) -> None:
    """Unmount, if it is mounted; children of a step that was ended may take a moment to let go."""
    deadline = time.monotonic() + STOP_SECONDS
    while mountpoint.is_mount():
        # A session of its own, as for all the rest: Ctrl-C goes to the whole group of the terminal.
        done = subprocess.run(["umount", mountpoint], capture_output=True, text=True, start_new_session=True)
        if done.returncode != 0 and time.monotonic() > deadline:
            raise StepError(f"cannot unmount {mountpoint}: {done.stderr.strip()}")
        time.sleep(0.05)


def messages(error: BaseException | None) -> Iterator[str]:
    """Yield what went wrong, first cause first: undoing a failed step may fail too."""
    if error is not None:
        yield from messages(None if error.__suppress_context__ else error.__context__)
        if isinstance(error, ERRORS):
            yield str(error)
            yield from getattr(error, "__notes__", [])


def run_to_end(name: str, work: Callable[[Interrupt, Display], None]) -> int:
    """Do the work of the script `name`; show what goes wrong, and return the exit status."""
    if not TARBALL.exists():
        print(f"{name}: there is no {TARBALL}: run scripts/{name}, which installs it", file=sys.stderr)
        return 1
    interrupt, display = Interrupt(), Display()
    interrupt.listen()
    try:
        work(interrupt, display)
    except ERRORS as error:
        for message in messages(error):
            display.line(f"{name}: {message}")
    else:
        return 0
    return 128 + interrupt.signal if interrupt.signal else 1
