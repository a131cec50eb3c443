"""Measure what each tier makes of the same real pages, and what a read of 4 KiB waits while that is under way.

The memory is beside that of kernel zram (lz4) and nbdkit (zstd) for the same pages; the latencies are beside those of
the same server while it does nothing else, measured before and after each work.
"""

import random
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import nbd
from corpus import Corpus, collect
from harness import Interrupt, StepError, mib
from kernel_build import SkippedError
from measuring import (
    MIB,
    SHARED_MEMORY,
    Progress,
    ending_well,
    output_option,
    require_memory,
    run_program,
    this_machine,
)
from other_servers import KernelPeer, Nbdkit
from peers import Peer, Zramd, best_engine
from report import table, write_json

from zramd.layout import PAGE_SIZE
from zramd.status.client import ask

IDLE_SECONDS = 5.0
LEAST_READS = 100
BLOCK = 128 << 10


@dataclass(frozen=True, slots=True)
class Latency:
    """How long reads took, in microseconds, and how many there were."""

    reads: int
    p50: float
    p99: float
    p999: float
    most: float


class Reader(threading.Thread):
    """A client that reads pages at random, one after the other, until it is stopped."""

    def __init__(self, uri: str, pages: int) -> None:
        super().__init__(name="reader", daemon=True)
        self._handle = nbd.NBD()
        self._handle.connect_uri(uri)
        self._pages = pages
        self._took = array("Q")
        self._ended = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> None:
        """Read."""
        choose = random.Random(1).randrange  # noqa: S311 (the same order every time)
        try:
            while not self._ended.is_set():
                offset = choose(self._pages) * PAGE_SIZE
                started = time.perf_counter_ns()
                self._handle.pread(PAGE_SIZE, offset)
                self._took.append(time.perf_counter_ns() - started)
        except nbd.Error as error:
            self._failure = error

    def end(self) -> Latency:
        """Stop, and return what it took."""
        self._ended.set()
        self.join()
        self._handle.shutdown()
        if self._failure:
            raise StepError(f"a read failed: {self._failure}")
        took = sorted(self._took)
        if len(took) < LEAST_READS:
            raise StepError(f"only {len(took)} reads in that time: too few for a percentile")
        p50, p99, p999 = (took[int(len(took) * share)] / 1000 for share in (0.5, 0.99, 0.999))
        return Latency(len(took), p50, p99, p999, took[-1] / 1000)


@dataclass(frozen=True, slots=True)
class Beside:
    """Reads beside some work, which took so many seconds; and beside nothing (before or after it: the worse)."""

    name: str
    seconds: float
    latency: Latency
    idle: Latency


class Lab:
    """The server that is measured, with the corpus on it."""

    def __init__(self, server: Zramd, corpus: Corpus, interrupt: Interrupt, progress: Progress) -> None:
        self.server = server
        self.pages = corpus.size // PAGE_SIZE
        self._interrupt = interrupt
        self._progress = progress

    def reads(self, work: Callable[[], object]) -> tuple[Latency, float]:
        """Return how long reads take while `work` is done, and the seconds that takes."""
        self._interrupt.check()
        reader = Reader(self.server.uri, self.pages)
        started = time.monotonic()
        reader.start()
        try:
            work()
            seconds = time.monotonic() - started
        finally:
            latency = reader.end()
        return latency, seconds

    def beside(self, name: str, work: Callable[[], object]) -> Beside:
        """Measure reads beside some work, and beside nothing before and after it."""
        self._progress.step(name)
        before, _ = self.reads(lambda: time.sleep(IDLE_SECONDS / 2))
        latency, seconds = self.reads(work)
        after, _ = self.reads(lambda: time.sleep(IDLE_SECONDS / 2))
        return Beside(name, seconds, latency, before if before.p99 > after.p99 else after)

    def word(self, line: str, times: int = 1) -> Callable[[], object]:
        """Return what asks for a control word, some times."""
        return lambda: [ask(self.server.admin, line, None) for _ in range(times)]


@contextmanager
def busy_process() -> Iterator[None]:
    """Have a process that only uses a processor: what any work at all costs the reads on this machine."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _sleep_beside_a_process() -> None:
    with busy_process():
        time.sleep(IDLE_SECONDS)


def others(directory: Path, corpus: Corpus, interrupt: Interrupt, progress: Progress) -> Iterator[tuple[str, int]]:
    """Yield what other servers take for the same pages."""
    peers: list[Peer] = [KernelPeer(directory, corpus.size), Nbdkit(directory, corpus.size, "zstd")]
    for peer in peers:
        progress.step(peer.name)
        try:
            peer.start(interrupt)
            before = 0 if isinstance(peer, KernelPeer) else peer.memory()
            run_program(peer.write_command(corpus.path, BLOCK), interrupt)
            yield peer.name, peer.memory() - before
        except SkippedError as reason:
            progress.line(f"{peer.name} is left out: {reason}")
        finally:
            peer.stop()


def works(lab: Lab, directory: Path) -> Iterator[tuple[Beside, str]]:
    """Yield the reads beside each work in turn, and what the pages are then stored as, if that is other than before."""
    word = lab.word
    yield lab.beside("a busy process", _sleep_beside_a_process), ""
    yield lab.beside("idle all", word("idle all", 40)), ""
    yield lab.beside("policy explain", word("policy explain", 5)), ""
    yield lab.beside("estimate", word("estimate samples=1024")), ""
    with (directory / "image").open("wb") as file:
        saved = lab.beside("save", lambda: ask(lab.server.admin, "save fd", None, file.fileno()))
    (directory / "image").unlink()
    yield saved, ""
    yield lab.beside("recompress, zstd 3", word("recompress priority=1")), "zstd 3"
    yield lab.beside("recompress, zstd 9", word("recompress priority=2")), "zstd 9"
    yield lab.beside("compact", word("compact 1")), "zstd 9, compacted"
    yield lab.beside("train", word("train level=9 priority=3 install=1")), ""
    yield lab.beside("recompress, zstd 9 with a dictionary", word("recompress priority=3")), "zstd 9 with a dictionary"
    yield lab.beside("compact again", word("compact 1")), "zstd 9 with a dictionary, compacted"
    yield lab.beside("writeback", word(f"writeback page_indexes=0-{lab.pages // 2 - 1}")), "half of them written back"


def report(tiers: list[tuple[str, int]], found: list[Beside], stored: int) -> Iterator[str]:
    """Yield the lines of both tables."""
    lz4 = dict(tiers).get("zramd lz4", 0)
    rows = [[name, f"{size / MIB:.1f}", f"{stored / size:.2f}", f"{size / lz4:.3f}"] for name, size in tiers]
    yield from table([f"{mib(stored)} of pages", "MiB", "ratio", "of zramd lz4"], rows)
    yield ""
    rows = []
    for beside in found:
        latency, idle = beside.latency, beside.idle
        figures = [f"{latency.reads:,}", f"{latency.p50:.0f}", f"{latency.p99:.0f}", f"{latency.p999:.0f}"]
        figures += [f"{latency.most:.0f}", f"{idle.p50:.0f}", f"{idle.p99:.0f}", f"{latency.p99 / idle.p99:.1f}"]
        rows.append([beside.name, f"{beside.seconds:.1f}", *figures])
    headings = ["beside", "s", "reads", "p50 us", "p99", "p99.9", "max", "idle p50", "idle p99", "p99 / idle"]
    yield from table(headings, rows)


@click.command()
@click.option("--size", type=click.IntRange(64), default=1024, show_default=True, help="MiB of real pages.")
@output_option
def main(size: int, output: Path | None) -> None:
    """Measure what recompression, dictionaries and writeback save, and what reads of 4 KiB wait beside them.

    The pages are real: programs, libraries, source, text, and memory of processes, each as much as this machine has.
    """
    machine, progress = this_machine(), Progress()
    with ending_well() as interrupt, ExitStack() as undo:
        undo.callback(progress.close)
        require_memory(3 * size * MIB, "choose a smaller --size")
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-tiers-", dir=SHARED_MEMORY)))
        on_disk = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-tiers-", dir="/var/tmp")))
        progress.note("collecting pages")
        corpus = collect(size * MIB, interrupt)
        progress.begin(14)
        tiers = list(others(directory, corpus, interrupt, progress))
        algorithms = "lz4 zstd(level=3) zstd(level=9)"
        server = Zramd(directory, corpus.size, best_engine(), algorithms)
        undo.callback(server.stop)
        server.start(interrupt)
        run_program(server.write_command(corpus.path, BLOCK), interrupt)
        tiers.append(("zramd lz4", server.mm_stat().mem_used_total))
        store = on_disk / "backing"
        store.touch()
        subprocess.run(["truncate", "-s", str(corpus.size), str(store)], check=True)
        ask(server.admin, f"backing_dev {store}")
        lab = Lab(server, corpus, interrupt, progress)
        found: list[Beside] = []
        for beside, name in works(lab, on_disk):
            found.append(beside)
            if name:
                tiers.append((f"zramd {name}", server.mm_stat().mem_used_total))
        progress.close()
        click.echo(f"{machine}; {best_engine().value} engine")
        for line in report(tiers, found, server.stored()):
            click.echo(line)
        if output is not None:
            write_json(output, {"machine": machine, "memory": tiers, "reads": found})


if __name__ == "__main__":
    main()
