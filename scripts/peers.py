"""A server that is measured: how it is started, what it holds and uses, and how it is stopped; and zramd's."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from harness import STOP_SECONDS, Interrupt, StepError, last_lines, parse_mm_stat
from kernel_build import SkippedError

from zramd import __version__
from zramd.device.counters import MmStat
from zramd.native import VARIABLE, Engine
from zramd.status.client import ask

START_SECONDS = 120  # nbdkit's malloc takes all its memory first
TICK = os.sysconf("SC_CLK_TCK")
CPUCLOCK_SCHED = 2


def require_engine(engine: Engine) -> None:
    """Check that this zramd has an engine.

    Raises:
        SkippedError: it has not.
    """
    if engine is Engine.NATIVE:
        try:
            importlib.import_module("zramd.native.engine")
        except ImportError as error:
            raise SkippedError(f"zramd was built without its native engine ({error})") from None


def best_engine() -> Engine:
    """Return the fastest engine that this zramd has."""
    try:
        require_engine(Engine.NATIVE)
    except SkippedError:
        return Engine.PYTHON
    return Engine.NATIVE


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and, in ticks, of its children that have ended."""
    # What clock_getcpuclockid() makes of a process: nanoseconds, and threads that have ended still count.
    own = time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return own + (int(fields[13]) + int(fields[14])) / TICK


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes, shared memory too."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def uri(socket: Path, export: str = "") -> str:
    """Return the NBD URI of a Unix socket."""
    return f"nbd+unix:///{export}?socket={socket}"


class Peer(ABC):
    """A server with one device of `size` bytes; its sockets and files are in `directory`."""

    def __init__(self, name: str, directory: Path, size: int) -> None:
        self.name = name
        self.size = size
        self._path = directory / name.replace(" ", "-")

    @abstractmethod
    def start(self, interrupt: Interrupt) -> None:
        """Start it, and wait until it serves.

        Raises:
            SkippedError: this machine does not have it.
            StepError: it does not start.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop it, if it runs, and remove its device."""

    @abstractmethod
    def fio(self) -> list[str]:
        """Return the options by which fio finds the device."""

    @abstractmethod
    def write_command(self, source: Path, block: int) -> list[str]:
        """Return a command that writes a file to the start of the device, in blocks of so many bytes."""

    @abstractmethod
    def read_command(self) -> list[str]:
        """Return a command that writes the device to standard output."""

    @abstractmethod
    def cpu(self) -> float | None:
        """Return the CPU seconds that the server has used; None where its work is done in the client."""

    @abstractmethod
    def memory(self) -> int:
        """Return the bytes of memory that the server takes, with those of the file that it serves."""

    @abstractmethod
    def stored(self) -> int:
        """Return how many bytes of the device hold data."""

    @abstractmethod
    def version(self) -> str:
        """Return what the server says of its version."""


class NbdPeer(Peer):
    """A server of NBD on a Unix socket. `package` is the Debian package of its `program`."""

    program: str
    package: str
    export = ""

    def __init__(self, name: str, directory: Path, size: int) -> None:
        super().__init__(name, directory, size)
        self.socket = self._path.with_suffix(".nbd")
        self._log = self._path.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command of the server."""

    def _environment(self) -> dict[str, str]:
        return {}

    def start(self, interrupt: Interrupt) -> None:
        """Start it, and wait until it answers."""
        self.launch()
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True).returncode:
            interrupt.check()
            if not self._alive() or time.monotonic() > deadline:
                raise StepError(f"{self.name} does not serve: {last_lines(self._log, 1)}")
            time.sleep(0.02)

    def launch(self) -> None:
        """Start it."""
        if shutil.which(self.program) is None:
            raise SkippedError(f"there is no {self.program}: apt-get install {self.package}")
        environment = {**os.environ, **self._environment()}
        with self._log.open("wb") as said:
            # A session of its own: Ctrl-C must not stop it while it is measured.
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env=environment,
            )

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop it, and by force if it does not listen."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def pid(self) -> int:
        """Its process."""
        if self._process is None:
            raise StepError(f"{self.name} was not started")
        return self._process.pid

    @property
    def uri(self) -> str:
        """Where clients find it."""
        return uri(self.socket, self.export)

    def fio(self) -> list[str]:
        """Return the options of fio's engine for NBD."""
        return ["--ioengine=nbd", f"--uri={self.uri}"]

    def write_command(self, source: Path, block: int) -> list[str]:
        """Return a command of nbdcopy that sends zeros as data too, and has 32 requests in flight."""
        options = [f"--request-size={block}", "--requests=32", "--connections=1", "--threads=1", "--sparse=0"]
        return ["nbdcopy", *options, str(source), self.uri]

    def read_command(self) -> list[str]:
        """Return a command of nbdcopy."""
        return ["nbdcopy", self.uri, "-"]

    def cpu(self) -> float | None:
        """Return the CPU seconds of its process."""
        return cpu_seconds(self.pid)

    def memory(self) -> int:
        """Return the resident memory of its process."""
        return resident(self.pid)

    def stored(self) -> int:
        """Return how much of its map is data."""
        asked = subprocess.run(["nbdinfo", "--map", "--json", self.uri], capture_output=True, text=True)
        if asked.returncode:
            raise StepError(f"nbdinfo cannot map {self.name}: {asked.stderr.strip()}")
        return sum(extent["length"] for extent in json.loads(asked.stdout) if not extent["type"])

    def version(self) -> str:
        """Return the first line of what it says."""
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True)
        return said.stdout.partition("\n")[0]


class Zramd(NbdPeer):
    """The program that is measured. It keeps its contents in the directory `state`, if there is one."""

    program = sys.executable
    package = "python3"

    def __init__(
        self, directory: Path, size: int, engine: Engine, algorithm: str = "lz4", state: Path | None = None
    ) -> None:
        super().__init__(f"zramd {engine.value} {algorithm}", directory, size)
        self._engine = engine
        self._algorithm = algorithm
        self._state = state
        self._status, self.admin = self._path.with_suffix(".status"), self._path.with_suffix(".admin")

    def launch(self) -> None:
        """Start it, with its engine."""
        require_engine(self._engine)
        super().launch()

    def _environment(self) -> dict[str, str]:
        return {VARIABLE: self._engine.value}

    def _command(self) -> list[str]:
        kept = ["--volatile"] if self._state is None else ["--state", str(self._state)]
        sockets = ["--unix", str(self.socket), "--status", str(self._status), "--admin", str(self.admin)]
        device = ["--size", str(self.size), "--algorithm", self._algorithm]
        return [self.program, "-m", "zramd", "serve", *device, *kept, *sockets]

    def mm_stat(self) -> MmStat:
        """Return its counters."""
        return parse_mm_stat(ask(self._status, "mm_stat"))

    def compact(self) -> None:
        """Have it compact its pool."""
        ask(self.admin, "compact 1", None)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def stored(self) -> int:
        """Return orig_data_size."""
        return self.mm_stat().orig_data_size

    def version(self) -> str:
        """Return that of this checkout, and of the library that compresses."""
        lines = (line.split(maxsplit=1) for line in ask(self._status, "codecs").splitlines())
        library = next(library for name, library in lines if name.strip("[]") == self._algorithm)
        return f"zramd {__version__}, {library}"
