"""Measure zramd beside other servers: the same clients, one run, interleaved repetitions, medians and ratios."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import click
from corpus import collect
from expected import Bare, Data, bare_codec, expectations
from harness import Interrupt, StepError
from kernel_build import SkippedError
from measuring import (
    MIB,
    SHARED_MEMORY,
    Machine,
    Progress,
    ending_well,
    output_option,
    plots_option,
    require_memory,
    this_machine,
)
from other_servers import all_peers
from peers import Peer
from report import Results, table, workload_table, write_json
from workloads import COMPRESSIBLE, QUICK, WORKLOADS, Disk, Workload, fill, fio_pages

from zramd.cli.options import Parsed
from zramd.native import Engine
from zramd.sizes import parse_size

MOST_CORPUS = 256 * MIB
FIO_PAGES = 64 * MIB  # enough for a codec's own benchmark
BARE_SECONDS = 1
LEAST_SIZE = 64 * MIB
SECONDS, REPEAT = 2.0, 5
QUICK_SECONDS, QUICK_REPEAT = 0.5, 3
QUICK_SERVERS = ("zramd * lz4", "nbdkit *", "kernel *")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done: on which servers (their names), what, for how many seconds, how often."""

    servers: list[str]
    workloads: list[Workload]
    seconds: float
    repeat: int
    size: int


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        engine: the engine of zramd that much is expected of, "" without zramd.
        reference: the server that the others are compared with.
    """

    machine: Machine = field(default_factory=this_machine)
    engine: str = ""
    reference: str = ""
    results: Results = field(default_factory=Results)
    bare: list[Bare] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Bench:
    """One run."""

    def __init__(self, plan: Plan, interrupt: Interrupt) -> None:
        self._plan = plan
        self._interrupt = interrupt
        self._progress = Progress()
        self.outcome = Outcome()

    def run(self) -> None:
        """Start the servers, fill their devices, measure, and stop them again."""
        with ExitStack() as undo:
            undo.callback(self._progress.close)
            directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-bench-", dir=SHARED_MEMORY)))
            self._progress.note("collecting the corpus")
            corpus = collect(min(MOST_CORPUS, self._plan.size // 4 // MIB * MIB), self._interrupt)
            disk = Disk(self._plan.size, corpus)
            peers = self._start(directory, undo)
            for peer in peers:
                self._progress.note(f"filling {peer.name}")
                fill(peer, disk, self._interrupt)
            pages = {Data.FIO: directory / "pages", Data.CORPUS: corpus.path}
            fio_pages(pages[Data.FIO], FIO_PAGES, self._interrupt)
            self._measure(peers, disk, pages)

    def _start(self, directory: Path, undo: ExitStack) -> list[Peer]:
        """Start the servers that are chosen and that this machine has."""
        chosen = [peer for peer in all_peers(directory, self._plan.size) if peer.name in self._plan.servers]
        require_memory(len(chosen) * self._plan.size, "choose fewer with --server, or a smaller --size")
        outcome = self.outcome
        started = []
        for peer in chosen:
            self._progress.note(f"starting {peer.name}")
            undo.callback(peer.stop)
            try:
                peer.start(self._interrupt)
            except SkippedError as reason:
                outcome.left_out[peer.name] = str(reason)
                self._progress.line(f"{peer.name} is left out: {reason}")
            else:
                outcome.versions[peer.name] = peer.version()
                started.append(peer)
        if not started:
            raise StepError("no server is left to measure")
        for engine in (Engine.PYTHON, Engine.NATIVE):
            if any(name.startswith(f"zramd {engine.value} ") for name in outcome.versions):
                outcome.engine = engine.value
        best = f"zramd {outcome.engine} lz4"
        outcome.reference = best if best in outcome.versions else started[0].name
        return started

    def _measure(self, peers: list[Peer], disk: Disk, pages: dict[Data, Path]) -> None:
        plan, outcome = self._plan, self.outcome
        codecs = self._codecs()
        self._progress.begin(plan.repeat * (len(codecs) + len(plan.workloads) * len(peers)))
        for turn in range(1, plan.repeat + 1):
            for algorithm, data in codecs:
                self._progress.step(f"{algorithm} alone, {data}")
                outcome.bare.append(bare_codec(algorithm, data, pages[data], BARE_SECONDS, self._interrupt))
            for workload in plan.workloads:
                for peer in peers:
                    self._progress.step(f"{workload.name}, {peer.name}")
                    sample = workload.run(peer, disk, plan.seconds, turn, self._interrupt)
                    outcome.results.add(workload.name, peer.name, sample)

    def _codecs(self) -> list[tuple[str, Data]]:
        """Return the codecs that something in this run is compared with."""
        chosen = {workload.name for workload in self._plan.workloads}
        return [
            (algorithm, data)
            for algorithm in ("lz4", "zstd")
            for data in Data
            if f"zramd {self.outcome.engine} {algorithm}" in self.outcome.versions
            and chosen.intersection(data.workloads)
        ]


def report(plan: Plan, outcome: Outcome) -> Iterator[str]:
    """Yield the lines of a report."""
    yield f"{outcome.machine}; devices of {plan.size // MIB} MiB, {plan.seconds:g} s a measurement, {plan.repeat} times"
    yield from (f"  {name}: {version}" for name, version in outcome.versions.items())
    yield from (f"  {name} is left out: {reason}" for name, reason in outcome.left_out.items())
    for workload in plan.workloads:
        yield from workload_table(workload, outcome.results, outcome.reference)
    yield ""
    yield f"Medians, with the least and the greatest. fio's data is {COMPRESSIBLE}% compressible. A page has 4 KiB."
    yield "MiB: resident memory with the file that is served; of kernel zram mem_used_total. Kernel zram works in its"
    yield "client, so its CPU time is there. *: the client had no time to spare, a faster server would not show."
    if not outcome.engine:
        return
    yield ""
    rows = [each.row() for each in expectations(outcome.results, outcome.bare, outcome.engine)]
    yield from table([f"expected ({outcome.engine} engine)", "bound", "median", "min..max", ""], rows)
    yield "5. cost a page against disksize and fill: scripts/scaling"


def as_json(plan: Plan, outcome: Outcome) -> dict[str, object]:
    """Return all of it, ready for JSON."""
    return {
        "machine": outcome.machine,
        "size": plan.size,
        "seconds": plan.seconds,
        "repeat": plan.repeat,
        "reference": outcome.reference,
        "versions": outcome.versions,
        "left_out": outcome.left_out,
        "medians": list(outcome.results.medians()),
        "expected": list(expectations(outcome.results, outcome.bare, outcome.engine)),
        "bare_codecs": outcome.bare,
        "samples": list(outcome.results.rows()),
    }


Named = TypeVar("Named", Peer, Workload)


def choose(option: str, patterns: Sequence[str], offered: Sequence[Named]) -> list[Named]:
    """Return what has a name that matches one of the patterns of an option."""
    chosen = [each for each in offered if any(fnmatchcase(each.name, pattern) for pattern in patterns)]
    if not chosen:
        names = ", ".join(each.name for each in offered)
        raise click.BadParameter(f"none has such a name; there are {names}", param_hint=option)
    return chosen


def parse_disk_size(text: str) -> int:
    """Return a size that can be laid out."""
    size = parse_size(text)
    if size < LEAST_SIZE or size % MIB:
        raise ValueError(f"{text} is not a whole number of MiB, or less than {LEAST_SIZE // MIB}")
    return size


@click.command()
@click.option("--size", type=Parsed("size", parse_disk_size), default="1G", show_default=True, help="Of each device.")
@click.option("--seconds", type=click.FloatRange(0.1), help=f"Of each measurement. Default: {SECONDS}.")
@click.option("--repeat", type=click.IntRange(1), help=f"Repetitions: medians are shown. Default: {REPEAT}.")
@click.option("--server", multiple=True, help="Only those of such a name, as 'zramd*'; may be repeated.")
@click.option("--workload", multiple=True, help="Only those of such a name, as '*128k*'; may be repeated.")
@click.option("--quick", is_flag=True, help="Few servers and workloads, three repetitions of 0.5 s: two minutes.")
@output_option
@plots_option
def main(
    size: int,
    seconds: float | None,
    repeat: int | None,
    server: tuple[str, ...],
    workload: tuple[str, ...],
    quick: bool,
    output: Path | None,
    plots: Path | None,
) -> None:
    """Measure zramd, other NBD servers and kernel zram with the same clients, on this machine, in one run.

    \b
    Example:
      scripts/bench --server 'zramd*' --server nbdkit* --workload '*4k qd32' --output bench.json --plots plots
    """
    offered = all_peers(SHARED_MEMORY, size)
    plan = Plan(
        [peer.name for peer in choose("--server", server or (QUICK_SERVERS if quick else ["*"]), offered)],
        choose("--workload", workload or (QUICK if quick else ["*"]), WORKLOADS),
        seconds or (QUICK_SECONDS if quick else SECONDS),
        repeat or (QUICK_REPEAT if quick else REPEAT),
        size,
    )
    with ending_well() as interrupt:
        bench = Bench(plan, interrupt)
        bench.run()
        for line in report(plan, bench.outcome):
            click.echo(line)
        if output is not None:
            write_json(output, as_json(plan, bench.outcome))
        if plots is not None:
            from plots import bench_plots

            outcome = bench.outcome
            bench_plots(plots, outcome.results, plan.workloads, outcome.reference, outcome.machine)


if __name__ == "__main__":
    main()
