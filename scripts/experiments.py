"""How zramd's cost changes with one thing at a time: size, fill, fragmentation, connections, stored data.

The cost of a page is taken with random requests that hit the same pages each time, spread over the whole device, and
that have all been written before.
"""

import socket
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path

from corpus import Corpus
from harness import Interrupt, StepError
from measuring import LOOK_MILLISECONDS, MIB, run_program
from peers import START_SECONDS, Zramd
from workloads import Disk, FioJob, Sample

from zramd.layout import PAGE_SIZE
from zramd.native import Engine

GIB = 1 << 30
SEED, OTHER_SEED = 1, 100  # of the pages that are measured, and of others
TOUCHED = FioJob("touched", PAGE_SIZE, 1, "randwrite", 32)
WHOLE = FioJob("whole", 128 << 10, 1, "write", 32)
COMPRESSIBLE = (20, 45, 70, 90)
"""Percent, of the data that fragments a device: objects of four sizes, none of which fits where another was."""


class Growth(Enum):
    """What a figure may do as x grows."""

    STAYS = auto()
    DOES_NOT_FALL = auto()
    WITH_THE_WORK = auto()
    ANY = auto()


@dataclass(frozen=True, slots=True)
class Figure:
    """What is measured, with its unit, and how it may grow."""

    name: str
    growth: Growth
    digits: int = 0


COSTS = (
    Figure("write us/page", Growth.STAYS, 2),
    Figure("read us/page", Growth.STAYS, 2),
    Figure("write IOPS", Growth.DOES_NOT_FALL),
    Figure("read IOPS", Growth.DOES_NOT_FALL),
)


@dataclass(frozen=True, slots=True)
class Point:
    """A place on the x axis, and what it is called."""

    name: str
    x: float


@dataclass(frozen=True, slots=True)
class Lab:
    """What all experiments use. `touched` is how many requests the cost of a page is taken from."""

    directory: Path
    engine: Engine
    touched: int
    interrupt: Interrupt


class Experiment(ABC):
    """Figures at several points. `axis` names x and its unit."""

    title: str
    axis: str
    figures: tuple[Figure, ...]
    logarithmic = False

    def __init__(self, lab: Lab, points: list[Point]) -> None:
        self.lab = lab
        self.points = points
        self.servers: dict[Point, Zramd] = {}

    @abstractmethod
    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Make what all repetitions at a point use."""

    @abstractmethod
    def sample(self, point: Point) -> list[float]:
        """Measure once, and return the figures."""

    def new_server(self, point: Point, undo: ExitStack, size: int = GIB, *, kept: bool = False) -> Zramd:
        """Return a server for a point, not yet started, with a directory of its own."""
        directory = self.lab.directory / f"{type(self).__name__}-{point.x:g}"
        directory.mkdir()
        server = Zramd(directory, size, self.lab.engine, state=directory / "state" if kept else None)
        undo.callback(server.stop)
        self.servers[point] = server
        return server

    def do(self, server: Zramd, job: FioJob, seed: int = SEED) -> Sample:
        """Have fio do a job on the whole device."""
        return job.run(server, _whole(server), 0, seed, self.lab.interrupt)

    def discard_half(self, server: Zramd, size: int) -> None:
        """Discard as many pages as half of the first `size` bytes have, at random: some are hit twice."""
        job = replace(TOUCHED, pattern="randtrim", span=size, requests=size // PAGE_SIZE // 2)
        self.do(server, job, OTHER_SEED)

    def fill(self, server: Zramd, size: int) -> None:
        """Write the start of a device, and check that it is there."""
        if size:
            run_program(replace(WHOLE, span=size).fill(server, _whole(server)), self.lab.interrupt)
        if server.stored() < size:
            raise StepError(f"{server.name} has {server.stored()} of {size} bytes that were written")

    def costs(self, server: Zramd, connections: int = 1) -> list[float]:
        """Return the figures of COSTS, and the memory of the server in MiB."""
        job = replace(TOUCHED, requests=self.lab.touched, connections=connections)
        written, read = self.do(server, job), self.do(server, replace(job, pattern="randread"))
        return [written.server_cpu or 0, read.server_cpu or 0, written.iops, read.iops, read.memory / MIB]

    def seconds_to_serve(self, server: Zramd) -> float:
        """Start a server, and return how long that takes until it greets a client."""
        started = time.perf_counter()
        server.launch()
        while time.perf_counter() < started + START_SECONDS:
            self.lab.interrupt.check()
            with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
                client.settimeout(LOOK_MILLISECONDS / 1000)
                client.connect(str(server.socket))
                if client.recv(8):
                    return time.perf_counter() - started
            time.sleep(0.001)
        raise StepError(f"{server.name} does not serve after {START_SECONDS} s")


def _whole(server: Zramd) -> Disk:
    return Disk(server.size, Corpus(Path(), 0))


class DiskSize(Experiment):
    """Sparse devices of up to a TiB, of which the same number of pages is used."""

    title, axis, logarithmic = "cost a page by disksize", "disksize, GiB", True
    figures = (*COSTS, Figure("MiB", Growth.STAYS))

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Start the server, and write the pages."""
        server = self.new_server(point, undo, int(point.x * GIB))
        server.start(self.lab.interrupt)
        self.costs(server)

    def sample(self, point: Point) -> list[float]:
        """Return the costs."""
        return self.costs(self.servers[point])


class Fill(Experiment):
    """A device of 1 GiB that is partly full, beside the pages that are used."""

    title, axis = "cost a page by fill", "fill, %"
    figures = (*COSTS, Figure("MiB", Growth.WITH_THE_WORK))

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Start the server, fill it, and write the pages."""
        server = self.new_server(point, undo)
        server.start(self.lab.interrupt)
        self.fill(server, int(server.size * point.x / 100) // MIB * MIB)
        self.costs(server)

    def sample(self, point: Point) -> list[float]:
        """Return the costs."""
        return self.costs(self.servers[point])


class Connections(Experiment):
    """A full device of 1 GiB, and several connections, each with 32 requests in flight on a part of its own."""

    title, axis, logarithmic = "cost a page by connections", "connections", True
    figures = (*COSTS, Figure("MiB", Growth.STAYS))

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Start one server for all."""
        if not self.servers:
            server = self.new_server(point, undo)
            server.start(self.lab.interrupt)
            self.fill(server, server.size)
        self.servers[point] = next(iter(self.servers.values()))

    def sample(self, point: Point) -> list[float]:
        """Return the costs."""
        return self.costs(self.servers[point], int(point.x))


class Fragmentation(Experiment):
    """A device of 1 GiB when it was just filled, after random overwrites and discards, and after compaction."""

    title, axis = "cost a page by fragmentation", ""
    figures = (*COSTS, Figure("MiB", Growth.ANY), Figure("used/compressed", Growth.ANY, 3))

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Start one server for all."""
        if not self.servers:
            self.new_server(point, undo).start(self.lab.interrupt)
        self.servers[point] = next(iter(self.servers.values()))

    def sample(self, point: Point) -> list[float]:
        """Bring the device from the state before this point to this one, and return the costs."""
        server = self.servers[point]
        if point.name == "fresh":
            self.do(server, replace(WHOLE, pattern="trim", block=MIB, requests=server.size // MIB))
            self.fill(server, server.size)
        elif point.name == "fragmented":
            pages = server.size // PAGE_SIZE
            for seed, percent in enumerate(COMPRESSIBLE, OTHER_SEED + 1):
                options = (f"--buffer_compress_percentage={percent}",)
                self.do(server, replace(TOUCHED, requests=pages // len(COMPRESSIBLE), options=options), seed)
            self.discard_half(server, server.size)
        else:
            server.compact()
        stat = server.mm_stat()
        # Else the first writes would find pages empty, and not have to free anything.
        self.do(server, replace(TOUCHED, requests=self.lab.touched))
        return [*self.costs(server), stat.mem_used_total / max(stat.compr_data_size, 1)]


class StartUp(Experiment):
    """A server of an empty device."""

    title, axis, logarithmic = "start-up by disksize", "disksize, GiB", True
    figures = (Figure("seconds", Growth.STAYS, 3),)

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Make the server."""
        self.new_server(point, undo, int(point.x * GIB))

    def sample(self, point: Point) -> list[float]:
        """Return how long it takes."""
        server = self.servers[point]
        seconds = self.seconds_to_serve(server)
        server.stop()
        return [seconds]


class Recovery(Experiment):
    """A server that was killed, and finds its device of 1 GiB on a tmpfs."""

    title, axis = "recovery by stored data", "stored, MiB"
    figures = (Figure("seconds", Growth.WITH_THE_WORK, 3),)

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Fill the device, and kill the server."""
        server = self.new_server(point, undo, kept=True)
        server.start(self.lab.interrupt)
        self.fill(server, int(point.x) * MIB)
        server.kill()

    def sample(self, point: Point) -> list[float]:
        """Return how long it takes until the device is served again, and kill it again."""
        server = self.servers[point]
        seconds = self.seconds_to_serve(server)
        if server.stored() != point.x * MIB:
            raise StepError(f"{server.name} recovered {server.stored()} bytes of {point.x:.0f} MiB")
        server.kill()
        return [seconds]


class Compaction(Experiment):
    """A device of which half is discarded at random."""

    title, axis = "compaction by stored data", "stored before half of it is discarded, MiB"
    figures = (Figure("seconds", Growth.WITH_THE_WORK, 3), Figure("MiB freed", Growth.ANY, 1))

    def prepare(self, point: Point, undo: ExitStack) -> None:
        """Start the server."""
        self.new_server(point, undo).start(self.lab.interrupt)

    def sample(self, point: Point) -> list[float]:
        """Fill the device, discard half, and return how long the compaction takes and what it frees."""
        server, size = self.servers[point], int(point.x) * MIB
        self.fill(server, size)
        if size:
            self.discard_half(server, size)
        before, started = server.mm_stat().mem_used_total, time.perf_counter()
        server.compact()
        seconds = time.perf_counter() - started
        return [seconds, (before - server.mm_stat().mem_used_total) / MIB]
