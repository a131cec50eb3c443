"""What is expected of zramd, as ratios to what else one run measured, and the bare codecs that some of them need."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from harness import Interrupt, StepError
from measuring import Spread, run_program, spread
from report import Results, Run
from workloads import Sample

from zramd.layout import PAGE_SIZE

MALLOC, ZSTD, KERNEL = "nbdkit malloc", "nbdkit zstd", "kernel zram lz4"
LARGE_WRITE, LARGE_READ = "write 128k qd32", "read 128k qd32"
CORPUS_WRITE, CORPUS_READ = "corpus write 128k", "corpus read 128k qd32"


class Data(StrEnum):
    """What the pages hold."""

    FIO = "fio's data"
    CORPUS = "corpus"

    @property
    def workloads(self) -> tuple[str, str]:
        """The workloads that write and read it, whose CPU time is compared with the codec's."""
        return (LARGE_WRITE, LARGE_READ) if self is Data.FIO else (CORPUS_WRITE, CORPUS_READ)


@dataclass(frozen=True, slots=True)
class Bare:
    """What a codec alone takes, in microseconds of CPU a page of 4 KiB: no server, no pool, one thread."""

    algorithm: str
    data: Data
    compress: float
    decompress: float


def bare_codec(algorithm: str, data: Data, pages: Path, seconds: int, interrupt: Interrupt) -> Bare:
    """Measure a codec at zramd's default level on a file of pages, with the benchmark of its own program.

    Raises:
        StepError: the program says nothing that can be read.
    """
    level = {"lz4": 1, "zstd": 3}[algorithm]
    done = run_program([algorithm, f"-b{level}", f"-B{PAGE_SIZE}", f"-i{seconds}", str(pages)], interrupt)
    speeds = bare_speeds(done.output)
    if speeds is None:
        raise StepError(f"{algorithm} -b says nothing of its speed: {done.output.strip()!r}")
    # It goes by elapsed time, of which other programs take their share on a busy machine; the servers' is CPU time.
    share = min(1.0, done.cpu / done.seconds)
    return Bare(algorithm, data, *(PAGE_SIZE / speed * share for speed in speeds))


def bare_speeds(said: str) -> tuple[float, float] | None:
    """Return the last MB/s (10^6) of compression and decompression in what lz4 -b or zstd -b print."""
    found = re.findall(r"([\d.]+) MB/s ?, *([\d.]+) MB/s", said)
    return (float(found[-1][0]), float(found[-1][1])) if found else None


@dataclass(frozen=True, slots=True)
class Expectation:
    """A ratio, what it should be (or no more than shown), and what it was; None if this run did not measure it."""

    title: str
    bound: float | None
    at_least: bool
    measured: Spread | None

    @property
    def verdict(self) -> str:
        """Say whether it is reached."""
        if self.measured is None:
            return "not measured in this run"
        if self.bound is None:
            return ""
        return "reached" if (self.measured.median >= self.bound) == self.at_least else "NOT reached"

    def row(self) -> list[str]:
        """Return a row of the table."""
        bound = "-" if self.bound is None else f"{'>=' if self.at_least else '<='} {self.bound}"
        figures = ["-", "-"]
        if self.measured is not None:
            figures = [f"{self.measured.median:.2f}", f"{self.measured.low:.2f}..{self.measured.high:.2f}"]
        return [self.title, bound, *figures, self.verdict]


def expectations(results: Results, bare: list[Bare], engine: str) -> Iterator[Expectation]:
    """Yield what is expected of an engine of zramd."""
    lz4 = f"zramd {engine} lz4"

    def faster(number: int, workload: str, peer: str, bound: float) -> Expectation:
        title = f"{number}. {workload}: throughput, lz4 / {peer}"
        return Expectation(title, bound, True, results.ratio(_rate, (workload, lz4), (workload, peer)))

    yield faster(1, "randwrite 4k qd32", MALLOC, 1.0)
    yield faster(1, "randread 4k qd32", MALLOC, 1.0)
    yield faster(1, "randwrite 4k qd32", ZSTD, 8.0)
    for algorithm, compress, decompress in (("lz4", 1.5, 2.0), ("zstd", 1.2, 1.5)):
        server = f"zramd {engine} {algorithm}"
        for data in Data:
            write, read = data.workloads
            alone = [figures for figures in bare if (figures.algorithm, figures.data) == (algorithm, data)]
            yield _against_codec(results, (write, server), compress, [figures.compress for figures in alone])
            yield _against_codec(results, (read, server), decompress, [figures.decompress for figures in alone])
    for workload in (LARGE_WRITE, LARGE_READ, CORPUS_WRITE, CORPUS_READ):
        yield faster(3, workload, KERNEL, 0.8)
    for workload in ("randwrite 4k qd32", "randread 4k qd32"):
        yield faster(3, workload, KERNEL, 0.6)
    depth1 = "randread 4k qd1"
    latency = results.ratio(lambda sample: sample.p50, (depth1, lz4), (depth1, MALLOC))
    yield Expectation(f"4. {depth1}: p50, lz4 / {MALLOC}", 1.1, False, latency)
    # The client of the last one is so cheap, beside the codec, that two cores have room for both connections.
    several = [("randwrite 4k qd32", "lz4"), ("randread 4k qd32", "lz4"), (LARGE_WRITE, "zstd")]
    for workload, algorithm in several:
        server = f"zramd {engine} {algorithm}"
        runs = (f"{workload} x2", server), (workload, server)
        rate, cpu = results.ratio(_rate, *runs), results.ratio(_cpu, *runs)
        yield Expectation(f"6. {workload}: throughput, {algorithm}, two connections / one", 1.7, True, rate)
        yield Expectation(f"6. {workload}: server CPU a page, {algorithm}, two connections / one", None, False, cpu)


def _rate(sample: Sample) -> float:
    return sample.rate


def _cpu(sample: Sample) -> float | None:
    return sample.server_cpu


def _against_codec(results: Results, run: Run, bound: float, alone: list[float]) -> Expectation:
    workload, server = run
    pairs = zip(results.samples(*run), alone, strict=False)
    ratios = spread(None if sample.server_cpu is None else sample.server_cpu / codec for sample, codec in pairs)
    return Expectation(f"2. {workload}: server CPU, {server} / bare codec", bound, False, ratios)
