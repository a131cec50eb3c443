"""What the servers are asked to do, and what one run of it measures.

A device has two parts: the first holds the corpus, in the rest fio reads and writes data of its own. Both are written
in full before anything is counted, so that each measured write is an overwrite and each read finds data.
"""

import json
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from corpus import Corpus
from harness import Interrupt, StepError
from measuring import MIB, Finished, run_program
from peers import Peer

from zramd.layout import PAGE_SIZE

COMPRESSIBLE = 60  # percent, of fio's data
FIO_DATA = ["--refill_buffers", f"--buffer_compress_percentage={COMPRESSIBLE}"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one run measured; None is not known.

    Attributes:
        iops: requests a second.
        rate: bytes a second.
        p50: latency in microseconds from the client's submission on, and so p99 and p999 (99.9 %).
        server_cpu: CPU of the server in microseconds a page of 4 KiB; client_cpu: of the client.
        client_busy: share of the time that the client had a CPU for, of each connection. Near 1 it is the client that
            was measured: a faster server would not show.
        memory: bytes that the server takes after the run.
    """

    iops: float
    rate: float
    p50: float | None
    p99: float | None
    p999: float | None
    server_cpu: float | None
    client_cpu: float
    client_busy: float
    memory: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a client did: requests, bytes, elapsed seconds, its own CPU seconds, and percentiles in microseconds."""

    requests: int
    size: int
    seconds: float
    cpu: float
    percentiles: tuple[float | None, float | None, float | None] = (None, None, None)


@dataclass(frozen=True, slots=True)
class Disk:
    """How a device is laid out, in bytes."""

    size: int
    corpus: Corpus


@dataclass(frozen=True, slots=True)
class Workload(ABC):
    """Requests of `block` bytes, over so many connections."""

    name: str
    block: int
    connections: int

    @abstractmethod
    def command(self, peer: Peer, disk: Disk, seconds: float, seed: int) -> list[str]:
        """Return the client's command."""

    @abstractmethod
    def traffic(self, finished: Finished, disk: Disk) -> Traffic:
        """Return what the client did."""

    def run(self, peer: Peer, disk: Disk, seconds: float, seed: int, interrupt: Interrupt) -> Sample:
        """Do it for so many seconds."""
        command = self.command(peer, disk, seconds, seed)
        before = peer.cpu()
        did = self.traffic(run_program(command, interrupt), disk)
        after = peer.cpu()
        pages = did.size / PAGE_SIZE
        return Sample(
            did.requests / did.seconds,
            did.size / did.seconds,
            *did.percentiles,
            server_cpu=None if before is None or after is None else (after - before) * 1e6 / pages,
            client_cpu=did.cpu * 1e6 / pages,
            client_busy=did.cpu / did.seconds / self.connections,
            memory=peer.memory(),
        )


@dataclass(frozen=True, slots=True)
class FioJob(Workload):
    """A pattern of fio, at a queue depth a connection.

    Attributes:
        span: bytes that it goes over; 0 is all that is fio's.
        requests: how many there are, over all connections; 0 is as many as there is time for. A number of them at
            random hits the same pages each time that the seed is the same.
    """

    pattern: str
    depth: int
    options: tuple[str, ...] = ()
    span: int = 0
    on_corpus: bool = False
    requests: int = 0

    def command(self, peer: Peer, disk: Disk, seconds: float, seed: int) -> list[str]:
        """Return fio's command; with one seed the requests are the same, whoever serves them."""
        limits = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
        if self.requests:
            # A map of what was hit takes 32 MiB a TiB.
            limits = [f"--number_ios={self.requests // self.connections}", "--norandommap"]
        return self._job(peer, disk, [*limits, f"--randseed={seed}"])

    def fill(self, peer: Peer, disk: Disk) -> list[str]:
        """Return a command that goes over all of its part of the device once."""
        return self._job(peer, disk, [])

    def _job(self, peer: Peer, disk: Disk, limits: list[str]) -> list[str]:
        start, end = (0, disk.corpus.size) if self.on_corpus else (disk.corpus.size, disk.size)
        each = min(self.span or end, end - start) // self.connections
        place = [f"--offset={start}", f"--size={each}", f"--offset_increment={each}"]
        load = [f"--rw={self.pattern}", f"--bs={self.block}", f"--iodepth={self.depth}"]
        # Latency from submission on: what a synchronous device does in the submission counts.
        report = ["--output-format=json", "--unified_rw_reporting=mixed", "--lat_percentiles=1", "--clat_percentiles=0"]
        several = ["--group_reporting", f"--numjobs={self.connections}"]
        return ["fio", "--name=bench", *peer.fio(), *load, *place, *FIO_DATA, *several, *report, *limits, *self.options]

    def traffic(self, finished: Finished, disk: Disk) -> Traffic:
        """Return what fio reports."""
        return fio_traffic(finished.output)


def fio_traffic(output: str) -> Traffic:
    """Return what fio's JSON reports of its one group; its own start is left out of the CPU time."""
    job = json.loads(output[output.index("{") :])["jobs"][0]
    mixed = job["mixed"]
    if not mixed["total_ios"]:
        raise StepError("fio did nothing: give it more --seconds")
    percentile = mixed["lat_ns"]["percentile"]
    return Traffic(
        requests=mixed["total_ios"],
        size=mixed["io_bytes"],
        seconds=mixed["runtime"] / 1000,
        cpu=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
        percentiles=(percentile["50.000000"] / 1e3, percentile["99.000000"] / 1e3, percentile["99.900000"] / 1e3),
    )


@dataclass(frozen=True, slots=True)
class CorpusWrite(Workload):
    """The corpus, written once from its file: fio cannot send given data. There are no latencies."""

    def command(self, peer: Peer, disk: Disk, seconds: float, seed: int) -> list[str]:
        """Return the command that copies the file."""
        return peer.write_command(disk.corpus.path, self.block)

    def traffic(self, finished: Finished, disk: Disk) -> Traffic:
        """Return what was copied; the time is that of the whole program."""
        return Traffic(disk.corpus.size // self.block, disk.corpus.size, finished.seconds, finished.cpu)


def _fio(pattern: str, kib: int, depth: int, connections: int = 1) -> FioJob:
    several = f" x{connections}" if connections > 1 else ""
    return FioJob(f"{pattern} {kib}k qd{depth}{several}", kib << 10, connections, pattern, depth)


WORKLOADS: list[Workload] = [
    *(_fio(pattern, 4, depth) for depth in (1, 32) for pattern in ("randwrite", "randread", "write", "read")),
    *(_fio(pattern, 128, 32) for pattern in ("write", "read")),
    FioJob("mix 70/30 4k qd32", 4096, 1, "randrw", 32, ("--rwmixread=70",)),
    *(_fio(pattern, 4, 32, connections) for connections in (2, 4) for pattern in ("randwrite", "randread")),
    *(_fio(pattern, 128, 32, connections) for connections in (2, 4) for pattern in ("write", "read")),
    FioJob("hot overwrite 4k qd32", 4096, 1, "randwrite", 32, ("--random_distribution=zipf:1.2",), 64 * MIB),
    FioJob("discard+write 4k qd32", 4096, 1, "randtrimwrite", 32),
    *(
        workload
        for kib in (4, 128)
        for workload in (
            CorpusWrite(f"corpus write {kib}k", kib << 10, 1),
            FioJob(f"corpus read {kib}k qd32", kib << 10, 1, "read", 32, on_corpus=True),
        )
    ),
]
QUICK = ("randwrite 4k qd32", "randread 4k qd32", "randread 4k qd1", "write 128k qd32", "read 128k qd32")


def fill(peer: Peer, disk: Disk, interrupt: Interrupt) -> None:
    """Write all of a device, and check that it is there.

    Raises:
        StepError: it is not.
    """
    block = 128 << 10
    run_program(FioJob("fill", block, 1, "write", 32).fill(peer, disk), interrupt)
    # The corpus has zeros, which some servers do not store; that is read back instead.
    if peer.stored() < disk.size - disk.corpus.size:
        raise StepError(f"{peer.name} has {peer.stored()} of {disk.size - disk.corpus.size} bytes that were written")
    run_program(peer.write_command(disk.corpus.path, block), interrupt)
    _require_corpus(peer, disk.corpus, interrupt)


def _require_corpus(peer: Peer, corpus: Corpus, interrupt: Interrupt) -> None:
    with (
        corpus.path.open("rb") as wanted,
        subprocess.Popen(
            peer.read_command(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as source,
    ):
        try:
            while expected := wanted.read(MIB):
                interrupt.check()
                if source.stdout is None or source.stdout.read(MIB) != expected:
                    raise StepError(f"{peer.name} does not return what was written to it")
        finally:
            source.kill()


def fio_pages(path: Path, size: int, interrupt: Interrupt) -> None:
    """Write a file of the data that fio sends."""
    place = [f"--filename={path}", f"--size={size}", "--rw=write", "--bs=128k"]
    run_program(["fio", "--name=data", *place, *FIO_DATA], interrupt)
