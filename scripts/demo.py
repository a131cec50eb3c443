"""Unpack and compile Linux on an ext4 file system on a zramd device, and report what that cost.

It is the whole way that data takes: file system, block device, NBD, compression, pool, and back, with every
file checked by checksum. Whatever happens, nothing stays mounted, attached or running.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from zramd.attach import AttachError
from zramd.attach.kernel import NbdDevice, has_nbd
from zramd.attach.loop import LoopDevice
from zramd.device.counters import MmStat
from zramd.status.client import StatusError, ask

TARBALL = Path("/usr/src/linux-source-6.1.tar.xz")
READY_SECONDS = 20
STOP_SECONDS = 10
# What may stay after the trim: the metadata of an empty file system (bitmaps, inode tables once used).
LEFT_AFTER_TRIM = 0.05
# What part of the memory that the pool frees must leave the process.
GIVEN_BACK = 0.9


class DemoError(Exception):
    """A step failed; the message says which and why."""


class InterruptError(Exception):
    """A signal asked the demo to end."""


@dataclass(frozen=True)
class Sample:
    """What the daemon held at one moment."""

    mm_stat: MmStat
    resident: int

    @property
    def ratio(self) -> float:
        """How many bytes of data one byte of memory holds."""
        return self.mm_stat.orig_data_size / max(self.mm_stat.mem_used_total, 1)

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
    def start(cls, directory: Path, size: str, algorithm: str) -> "Server":
        """Start the daemon, with its sockets in `directory`."""
        nbd, status, log = directory / "demo.nbd", directory / "demo.status", directory / "zramd.log"
        command: list[str | Path] = [sys.executable, "-m", "zramd", "serve", "--volatile"]
        command += ["--size", size, "--algorithm", algorithm, "--unix", nbd, "--status", status]
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
                raise DemoError(f"zramd did not serve within {READY_SECONDS} s: {last_lines(self.log, 1)}")
            time.sleep(0.05)

    def require_alive(self) -> None:
        """Check that the daemon has not ended."""
        if self.process.poll() is not None:
            raise DemoError(f"zramd ended with status {self.process.returncode}: {last_lines(self.log, 1)}")

    def mm_stat(self) -> MmStat:
        """Ask the daemon for its counters."""
        return MmStat(*(int(value) for value in ask(self.status, "mm_stat").split()))

    def memory(self, name: str) -> int:
        """Return a field of the daemon's /proc/PID/status (VmRSS, VmHWM) in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        if found is None:
            raise DemoError(f"the daemon's process has no {name}")
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
            raise DemoError(str(error)) from error
        if self.peak is None or sample.mm_stat.orig_data_size >= self.peak.mm_stat.orig_data_size:
            self.peak = sample
        return sample

    def stop(self) -> None:
        """End the daemon, and by force if it does not listen."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise DemoError(f"zramd did not end within {STOP_SECONDS} s of SIGINT and was killed") from None


@dataclass
class Demo:
    """The steps, and what they need to know of each other."""

    server: Server
    directory: Path
    interrupt: Interrupt
    display: Display
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
                sample = self.server.sample()
                self.display.progress(f"{title}: {time.monotonic() - started:.0f} s, {summary(sample)}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                end_group(process)
        if process.returncode != 0:
            # A daemon that died is the reason, the I/O error that followed is not.
            self.server.require_alive()
            raise DemoError(f"{title} failed with status {process.returncode}:\n{last_lines(log, 5)}")
        self.times[title] = time.monotonic() - started
        self.display.line(f"{title}: {self.times[title]:.1f} s, {summary(self.server.sample())}")


def summary(sample: Sample) -> str:
    """Return the numbers of a progress line."""
    stat = sample.mm_stat
    return (
        f"{mib(stat.orig_data_size)} stored in {mib(stat.mem_used_total)} (ratio {sample.ratio:.2f}), "
        f"{mib(sample.resident)} resident"
    )


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


def attach(server: Server) -> NbdDevice | LoopDevice:
    """Make the export a block device, in the best way that the machine has."""
    return NbdDevice.attach(server.socket) if has_nbd() else LoopDevice.attach(server.socket)


def unmount(mountpoint: Path) -> None:
    """Unmount, if it is mounted; children of a step that was ended may take a moment to let go."""
    deadline = time.monotonic() + STOP_SECONDS
    while mountpoint.is_mount():
        # A session of its own, as for all the rest: Ctrl-C goes to the whole group of the terminal.
        done = subprocess.run(["umount", mountpoint], capture_output=True, text=True, start_new_session=True)
        if done.returncode != 0 and time.monotonic() > deadline:
            raise DemoError(f"cannot unmount {mountpoint}: {done.stderr.strip()}")
        time.sleep(0.05)


def build(demo: Demo, device: Path, mountpoint: Path) -> Sample:
    """Go through the steps on `device`; return what the daemon held after the trim."""
    tree, sums, jobs = mountpoint / "linux", demo.directory / "SHA256SUMS", len(os.sched_getaffinity(0))
    mount: list[str | Path] = ["mount", "-o", "discard,noatime", device, mountpoint]
    # The device dies with the daemon, so a journal would protect nothing. It is fresh and reads as zeros, so
    # the inode tables need not be zeroed, now or in the background.
    layout = ["-q", "-m", "0", "-O", "^has_journal", "-E", "assume_storage_prezeroed=1"]
    demo.step("make ext4", ["mkfs.ext4", *layout, device])
    demo.step("mount", mount)
    tree.mkdir()
    demo.step("unpack Linux", ["tar", "-C", tree, "--strip-components=1", "-xf", TARBALL])
    # Else the page cache hides what the device takes, and the compiler pays for it.
    demo.step("write it back", ["sync", "-f", tree])
    demo.step("configure", ["make", "-C", tree, "tinyconfig"])
    demo.step(f"compile (-j{jobs})", ["make", "-C", tree, f"-j{jobs}"])
    checksum = 'cd "$1" && find . -type f -exec sha256sum {} + >"$2"'
    verify = 'cd "$1" && sha256sum --check --quiet "$2"'
    demo.step("checksum", ["sh", "-c", checksum, "sh", tree, sums])
    demo.step("unmount", ["umount", mountpoint])
    demo.step("fsck", ["e2fsck", "-f", "-n", device])
    demo.step("mount again", mount)
    demo.step("verify", ["sh", "-c", verify, "sh", tree, sums])
    demo.step("delete", ["rm", "-r", tree])
    demo.step("sync", ["sync", "-f", mountpoint])
    demo.step("trim", ["fstrim", mountpoint])
    return demo.server.sample()


def report(demo: Demo, peak: Sample, trimmed: Sample) -> None:
    """Print what the demo found."""
    show = demo.display.line
    show("")
    for title, seconds in {**demo.times, "all steps": sum(demo.times.values())}.items():
        show(f"{title:34}{seconds:8.1f} s")
    show("")
    show(f"{'':34}{'at peak':>12}{'after trim':>14}")
    sizes = ["orig_data_size", "compr_data_size", "mem_used_total"]
    meanings = ["data stored", "compressed to", "memory used"]
    for meaning, name in zip(meanings, sizes, strict=True):
        held = [getattr(sample.mm_stat, name) for sample in (peak, trimmed)]
        show(f"{f'{meaning} ({name})':34}{mib(held[0]):>12}{mib(held[1]):>14}")
    show(f"{'daemon resident (VmRSS)':34}{mib(peak.resident):>12}{mib(trimmed.resident):>14}")
    show(f"{'ratio (data / memory used)':34}{peak.ratio:>12.2f}{trimmed.ratio:>14.2f}")
    show("")
    show(f"mm_stat at peak:    {peak.mm_stat_line}")
    show(f"mm_stat after trim: {trimmed.mm_stat_line}")
    show(f"the most the daemon ever held resident (VmHWM): {mib(demo.server.memory('VmHWM'))}")


def check_trim(peak: Sample, trimmed: Sample) -> None:
    """Check that the memory of deleted files came back, to the pool and to the machine."""
    for name in ("orig_data_size", "mem_used_total"):
        before, after = getattr(peak.mm_stat, name), getattr(trimmed.mm_stat, name)
        if after > before * LEFT_AFTER_TRIM:
            raise DemoError(f"the trim did not give the memory back: {name} was {before} and is {after}")
    freed = peak.mm_stat.mem_used_total - trimmed.mm_stat.mem_used_total
    if peak.resident - trimmed.resident < freed * GIVEN_BACK:
        raise DemoError(f"the pool freed {freed} bytes, but VmRSS went from {peak.resident} to {trimmed.resident}")


def remove(directory: Path, mountpoint: Path) -> None:
    """Remove the demo's directory, but never what is mounted in it."""
    if mountpoint.is_mount():
        raise DemoError(f"{directory} is left: unmount {mountpoint}, then remove it")
    shutil.rmtree(directory)


def run(size: str, algorithm: str, interrupt: Interrupt, display: Display) -> None:
    """Set everything up, go through the steps, report, and undo it all."""
    directory = Path(tempfile.mkdtemp(prefix="zramd-demo-"))
    mountpoint = directory / "mnt"
    with contextlib.ExitStack() as undo:
        undo.callback(remove, directory, mountpoint)
        mountpoint.mkdir()
        server = Server.start(directory, size, algorithm)
        undo.callback(server.stop)
        server.wait_ready(interrupt)
        device = attach(server)
        undo.callback(device.detach)
        display.line(f"zramd serves {size} with {algorithm}, attached as {device.path} ({type(device).__name__})")
        undo.callback(unmount, mountpoint)
        # Seconds, when there is much left to write back.
        undo.callback(display.line, "unmounting, detaching, stopping")
        demo = Demo(server, directory, interrupt, display)
        trimmed = build(demo, device.path, mountpoint)
        peak = server.peak or trimmed
        report(demo, peak, trimmed)
        check_trim(peak, trimmed)
    display.line("every checksum matched, the memory came back, everything is detached and stopped")


def messages(error: BaseException | None) -> Iterator[str]:
    """Yield what went wrong, first cause first: undoing a failed step may fail too."""
    if error is not None:
        yield from messages(None if error.__suppress_context__ else error.__context__)
        if isinstance(error, InterruptError | DemoError | AttachError | OSError):
            yield str(error)
            yield from getattr(error, "__notes__", [])


def main() -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(prog="demo", description="Compile Linux on a zramd device.")
    parser.add_argument("--size", default="4G", help="size of the device; it needs 2G (default: %(default)s)")
    parser.add_argument("--algorithm", default="lz4", help="compression algorithm (default: %(default)s)")
    options = parser.parse_args()
    if not TARBALL.exists():
        print(f"demo: there is no {TARBALL}: run scripts/demo, which installs it", file=sys.stderr)
        return 1
    interrupt, display = Interrupt(), Display()
    interrupt.listen()
    try:
        run(options.size, options.algorithm, interrupt, display)
    except (InterruptError, DemoError, AttachError, OSError) as error:
        for message in messages(error):
            display.line(f"demo: {message}")
    else:
        return 0
    return 128 + interrupt.signal if interrupt.signal else 1


if __name__ == "__main__":
    sys.exit(main())
