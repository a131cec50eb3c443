"""Backing stores for scripts/writeback, and the disk that writes back to them."""

import json
import os
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbd
from harness import STOP_SECONDS, Interrupt, StepError, last_lines
from measuring import run_program

from tests.crash.servers import ExecutedServers, Server
from zramd.layout import (
    BACKING_UNIT_SHIFT,
    ENTRY_HANDLE_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    OBJECT_OVERHEAD,
    PAGE_SIZE,
    PageState,
)
from zramd.status.client import StatusError, ask

START_SECONDS = 30
VERIFY = ("--bs=64k", "--iodepth=16", "--verify=crc32c", "--verify_interval=4096", "--verify_fatal=1")
DATA = ("--buffer_compress_percentage=50", "--refill_buffers")
FAULTY_FILE = Path(__file__).with_name("faulty_file.py")


class Disk:
    """A disk of `size` bytes that is kept in a directory of its own, and a server that serves it."""

    def __init__(self, directory: Path, size: int, interrupt: Interrupt, *options: str) -> None:
        self.pages = size // PAGE_SIZE
        self._directory = directory
        self._interrupt = interrupt
        self._state = directory / "state"
        self._options = ["--state", str(self._state), "--size", str(size), *options]
        self._servers = ExecutedServers()
        self._serves = False
        self.server: Server

    def start(self) -> None:
        """Start the server, and wait until it serves."""
        self.server = self._servers.start(self._directory, *self._options)
        self._serves = True
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._interrupt.check()
            try:
                self.ask("mm_stat")
            except StatusError:
                if self.server.has_died(0.05) or time.monotonic() > deadline:
                    raise StepError(f"zramd does not serve: {last_lines(self.server.errors, 1)}") from None
            else:
                return

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        self._serves = False
        self.server.kill()
        self.server.end()

    def stop(self) -> None:
        """End the server, if it was started and not killed."""
        if not self._serves:
            return
        self._serves = False
        with suppress(StatusError):
            ask(self.server.admin, "stop force")
        if not self.server.has_died(STOP_SECONDS):
            self.server.kill()
        self.server.end()

    def ask(self, name: str) -> str:
        """Return an attribute."""
        return ask(self.server.status, name)

    def say(self, word: str) -> str:
        """Carry out a control word, however long it takes.

        Raises:
            StatusError: it is refused.
        """
        return ask(self.server.admin, word, None)

    def write_back(self) -> str:
        """Write back everything; return what stopped it, nothing if all is written."""
        try:
            self.say(f"writeback page_indexes=0-{self.pages - 1}")
        except StatusError as error:
            return str(error)
        return ""

    @property
    def backed(self) -> int:
        """Pages that are written back."""
        return int(json.loads(self.ask("json"))["bd_stat"]["pages"])

    @property
    def failed_reads(self) -> int:
        """Pages that the store did not return."""
        return int(json.loads(self.ask("json"))["io_stat"]["failed_backing_reads"])

    def places(self) -> dict[int, tuple[int, int]]:
        """Return which bytes of the store each written-back page has, as the page table in memory says."""
        entries = array("Q", (self._state / "page_table").read_bytes())
        found = {}
        for page, entry in enumerate(entries[: self.pages]):
            if entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK == PageState.WRITTEN_BACK:
                start = (entry & ENTRY_HANDLE_MASK) << BACKING_UNIT_SHIFT
                found[page] = start, start + OBJECT_OVERHEAD + (entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK)
        return found

    @contextmanager
    def client(self) -> Iterator[nbd.NBD]:
        """Return a connection."""
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///?socket={self.server.unix}")
        try:
            yield handle
        finally:
            handle.shutdown()

    def contents(self, pages: int) -> list[bytes | None]:
        """Return the first pages, each read by itself; None for one that cannot be read."""
        found: list[bytes | None] = []
        with self.client() as client:
            for page in range(pages):
                try:
                    found.append(bytes(client.pread(PAGE_SIZE, page * PAGE_SIZE)))
                except nbd.Error as error:
                    if error.errno != "EIO":
                        raise
                    found.append(None)
        return found

    def fio(self, offset: int, size: int, *options: str) -> None:
        """Run fio on a part of the disk; each of its blocks of 4 KiB has a checksum, and says where it belongs."""
        place = [f"--uri=nbd+unix:///?socket={self.server.unix}", f"--offset={offset}", f"--size={size}"]
        run_program(["fio", "--name=data", "--ioengine=nbd", *place, *VERIFY, *DATA, *options], self._interrupt)

    def write(self, offset: int, size: int) -> None:
        """Let fio write a part."""
        self.fio(offset, size, "--rw=write", "--do_verify=0")

    def verify(self, offset: int, size: int) -> None:
        """Let fio read a part that it wrote, and check every block."""
        self.fio(offset, size, "--rw=write", "--verify_only")


class InBackground:
    """Something that is done in a thread while the context lasts; what it fails with fails the context."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(action,), daemon=True) for action in actions]

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]


def make_file(path: Path, size: int) -> Path:
    """Make a sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """Return a block device on a file."""
    made = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True)
    if made.returncode:
        raise StepError(f"no loop device can be had: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


@contextmanager
def small_file_system(directory: Path, size: int) -> Iterator[Path]:
    """Return a directory with an ext4 of so many bytes."""
    image, mountpoint = make_file(directory / "ext4", size), directory / "mnt"
    mountpoint.mkdir()
    # Its journal, and what is kept for root, would take most of it.
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    with loop_device(image) as device:
        subprocess.run(["mount", device, mountpoint], check=True)
        try:
            yield mountpoint
        finally:
            subprocess.run(["umount", mountpoint], check=False)


class Faulty:
    """A file that fails as it is told to: see faulty_file.py."""

    def __init__(self, directory: Path, size: int) -> None:
        self._backing = make_file(directory / "backing", size)
        self._told = directory / "faults"
        self._mountpoint = directory / "fuse"
        self._mountpoint.mkdir()
        self.path = self._mountpoint / "store"
        self.heal()
        command: list[str | Path] = ["/usr/bin/python3", FAULTY_FILE, self._backing, self._mountpoint, self._told]
        self._process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not self.path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StepError("the faulty file cannot be mounted: it needs FUSE and python3-fusepy")
            time.sleep(0.05)

    def fail(self, **faults: list[tuple[str, int, int]]) -> None:
        """Let `reads` and `writes` fail from now on, as faulty_file.py says."""
        new = self._told.with_suffix(".new")
        new.write_text(json.dumps({"reads": [], "writes": []} | faults))
        os.replace(new, self._told)

    def heal(self) -> None:
        """Let nothing fail."""
        self.fail()

    def close(self) -> None:
        """Unmount it."""
        self.heal()
        subprocess.run(["fusermount3", "-u", "-z", self._mountpoint], check=False)
        self._process.wait()


@contextmanager
def faulty_file(directory: Path, size: int) -> Iterator[Faulty]:
    """Return a faulty file of so many bytes."""
    made = Faulty(directory, size)
    try:
        yield made
    finally:
        made.close()


def anonymous_memory(pid: int) -> int:
    """Return the bytes of memory that a process has, without files and what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise StepError(f"process {pid} has no memory")


def child_of(pid: int) -> int:
    """Return the one child of a process: the server of a supervisor."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
