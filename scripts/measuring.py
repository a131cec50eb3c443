"""What the benchmarks share: programs that a signal can end, medians with their spread, progress, the machine."""

import importlib.util
import os
import platform
import re
import resource
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from harness import ERRORS, Interrupt, StepError, end_group, messages, mib

PROGRAM = Path(sys.argv[0]).stem.replace("_", "-")
"""The command that runs: its wrapper in scripts/ installs what it needs."""
LOOK_MILLISECONDS = 200  # how long a signal may have to wait
MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (a tmpfs, for what others serve from memory too)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the least and greatest of what it is the median of."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of those values that are known, or None if there are none."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that did its work: what it printed, elapsed seconds, and CPU seconds of it and of its children."""

    output: str
    seconds: float
    cpu: float


def run_program(command: list[str], interrupt: Interrupt) -> Finished:
    """Run a program to its end, in a directory of its own.

    Raises:
        InterruptError: a signal came; the program and its children have ended.
        StepError: it failed.
    """
    interrupt.check()
    with tempfile.TemporaryDirectory(prefix="zramd-run-") as name, (Path(name) / "output").open("w+b") as said:
        before, started = _children_cpu(), time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=name, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except FileNotFoundError:
            raise StepError(f"there is no program {command[0]}: scripts/{PROGRAM} installs it") from None
        try:
            ended = _wait(process, interrupt)
        finally:
            if process.poll() is None:
                end_group(process)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if process.returncode:
        reason = (output.strip().splitlines() or ["it said nothing"])[-1]
        raise StepError(f"{command[0]} failed with status {process.returncode}: {reason}")
    return Finished(output, ended - started, _children_cpu() - before)


def _wait(process: subprocess.Popen[bytes], interrupt: Interrupt) -> float:
    """Wait for the end of a process, and return when that was: Popen.wait would notice it up to 50 ms late."""
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(LOOK_MILLISECONDS):
            interrupt.check()
    finally:
        os.close(descriptor)
    ended = time.perf_counter()
    process.wait()
    return ended


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Progress:
    """Says on standard error how far a run is, and how long the rest will take if it goes on like this."""

    def __init__(self) -> None:
        self._steps = self._done = 0
        self._started = 0.0
        self._live = sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Say what is being prepared, which is no step."""
        click.echo(f"\r\033[K{text}" if self._live else text, nl=not self._live, err=True)

    def line(self, text: str) -> None:
        """Say something that stays."""
        click.echo(f"\r\033[K{text}" if self._live else text, err=True)

    def begin(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._steps, self._done = steps, 0
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        """Say which step begins."""
        left = ""
        if self._done:
            seconds = round((time.monotonic() - self._started) / self._done * (self._steps - self._done))
            left = f", {seconds // 60}:{seconds % 60:02} left"
        self._done += 1
        self.note(f"{self._done}/{self._steps}{left}: {text}")

    def close(self) -> None:
        """Leave the line clear."""
        if self._live:
            click.echo("\r\033[K", nl=False, err=True)


@contextmanager
def ending_well() -> Iterator[Interrupt]:
    """Yield what the signals are noted in; show what goes wrong in a line each, and end the script."""
    interrupt = Interrupt()
    interrupt.listen()
    try:
        yield interrupt
    except ERRORS as error:
        for message in messages(error):
            click.echo(f"Error: {message}", err=True)
        sys.exit(128 + interrupt.signal if interrupt.signal else 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the figures come from; `load` is the load average at the start."""

    kernel: str
    cpu: str
    cpus: int
    load: float

    def __str__(self) -> str:
        return f"{self.cpus} CPUs ({self.cpu}), Linux {self.kernel}, load {self.load:.1f} at the start"


def this_machine() -> Machine:
    """Return the machine that this runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpus = len(os.sched_getaffinity(0))
    return Machine(platform.release(), names[0] if names else platform.machine(), cpus, os.getloadavg()[0])


def require_memory(size: int, remedy: str) -> None:
    """Check that this machine has so many bytes to spare.

    Raises:
        StepError: it has not.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = min(int(found[1]) * 1024 if found else 0, shutil.disk_usage(SHARED_MEMORY).free)
    if size > free:
        raise StepError(f"up to {mib(size)} of memory would be needed, and {mib(free)} are free: {remedy}")


def _require_matplotlib(_context: click.Context, _option: click.Parameter, directory: Path | None) -> Path | None:
    if directory is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.BadParameter(f"there is no matplotlib: scripts/{PROGRAM} installs it")
    return directory


def _require_directory(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {path.parent}")
    return path


output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_require_directory,
    help="Also write everything to this file, as JSON.",
)
"""An option of every benchmark; it fails at once, not after an hour."""
plots_option = click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_require_matplotlib,
    help="Also draw plots in this directory, SVG and PNG.",
)
"""Likewise."""
