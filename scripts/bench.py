"""Measure zramd against nbdkit's memory plugin: one fio line, one run, interleaved repetitions, medians and ratios.

Every server gets a device of 1 GiB, written once in full with the benchmark's data before anything is counted, so that
each measured write is an overwrite and each read finds data. The servers take turns inside each repetition, so that
other load on the machine meets all of them alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

SIZE = "1G"
COMPRESSIBLE = 60  # percent, of fio's data
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Workload:
    """One fio job: pattern, block size, queue depth."""

    pattern: str
    block: str
    depth: int

    @property
    def name(self) -> str:
        """Return what the tables call it."""
        return f"{self.pattern} {self.block} qd{self.depth}"


WORKLOADS = [
    Workload("randwrite", "4k", 32),
    Workload("randread", "4k", 32),
    Workload("randwrite", "4k", 1),
    Workload("randread", "4k", 1),
    Workload("write", "128k", 32),
    Workload("read", "128k", 32),
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: requests a second, percentiles of latency in microseconds, server CPU microseconds a 4 KiB page."""

    iops: float
    p50: float
    p99: float
    cpu_per_page: float


def peers(algorithms: list[str]) -> dict[str, list[str]]:
    """Return the command of each server; {socket} and {status} stand for the paths it is given."""
    commands = {
        f"zramd {algorithm}": [
            *(sys.executable, "-m", "zramd", "serve", "--volatile", "--size", SIZE, "--algorithm", algorithm),
            *("--unix", "{socket}", "--status", "{status}"),
        ]
        for algorithm in algorithms
    }
    for allocator in ("malloc", "zstd"):
        commands[f"nbdkit {allocator}"] = ["nbdkit", "-f", "-U", "{socket}", "memory", SIZE, f"allocator={allocator}"]
    return commands


@contextmanager
def serving(name: str, command: list[str], directory: Path) -> Iterator[tuple[int, Path]]:
    """Run a server. Yield its process id and its socket."""
    base = directory / name.replace(" ", "-")
    socket = base.with_suffix(".nbd")
    arguments = [part.format(socket=socket, status=base.with_suffix(".status")) for part in command]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        try:
            while subprocess.run(["nbdinfo", "--size", uri(socket)], capture_output=True).returncode:
                if process.poll() is not None:
                    raise click.ClickException(f"{name} did not start")
                time.sleep(0.05)
            yield process.pid, socket
        finally:
            process.terminate()


def uri(socket: Path) -> str:
    """Return the NBD URI of a Unix socket."""
    return f"nbd+unix:///?socket={socket}"


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def fio(socket: Path, workload: Workload, *limits: str) -> dict[str, dict[str, float]]:
    """Run one fio job and return its result."""
    result = subprocess.run(
        [
            *("fio", "--name=bench", "--ioengine=nbd", f"--uri={uri(socket)}", f"--rw={workload.pattern}"),
            *(f"--bs={workload.block}", f"--iodepth={workload.depth}", f"--size={SIZE}", "--refill_buffers"),
            *(f"--buffer_compress_percentage={COMPRESSIBLE}", "--output-format=json", *limits),
        ],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise click.ClickException(f"fio failed: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
    job: dict[str, dict[str, float]] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    return job


def measure(pid: int, socket: Path, workload: Workload, seconds: int) -> Sample:
    """Run a workload for some seconds."""
    before = cpu_seconds(pid)
    job = fio(socket, workload, "--time_based", f"--runtime={seconds}")
    used = cpu_seconds(pid) - before
    side = job["read" if "read" in workload.pattern else "write"]
    latency: dict[str, float] = side["clat_ns"]["percentile"]  # type: ignore[index]
    return Sample(
        iops=side["iops"],
        p50=latency["50.000000"] / 1000,
        p99=latency["99.000000"] / 1000,
        cpu_per_page=used * 1e6 / (side["io_bytes"] / 4096),
    )


def median(samples: list[Sample]) -> Sample:
    """Return the median of each figure."""
    return Sample(*(statistics.median(figures) for figures in zip(*(asdict(s).values() for s in samples), strict=True)))


def table(results: dict[str, dict[str, list[Sample]]]) -> Iterator[str]:
    """Yield the lines of a report; the ratios are of the first server's IOPS to each other's."""
    for workload, servers in results.items():
        first = next(iter(servers))
        reference = median(servers[first]).iops
        yield f"\n{workload}"
        yield f"  {'':14}{'IOPS':>9}{'min':>9}{'max':>9}{'p50 us':>9}{'p99 us':>9}{'cpu us/page':>13}  {first} / this"
        for name, samples in servers.items():
            middle = median(samples)
            low, high = min(s.iops for s in samples), max(s.iops for s in samples)
            yield (
                f"  {name:14}{middle.iops:9.0f}{low:9.0f}{high:9.0f}{middle.p50:9.0f}{middle.p99:9.0f}"
                f"{middle.cpu_per_page:13.2f}  {reference / middle.iops:.2f}"
            )


@click.command()
@click.option("--seconds", default=5, show_default=True, help="Length of each measurement.")
@click.option("--repeat", default=5, show_default=True, help="Repetitions; the medians are reported.")
@click.option("--algorithm", multiple=True, default=["lz4"], show_default=True, help="Of zramd; may be repeated.")
@click.option("--quick", is_flag=True, help="Only 4k at depth 32, three repetitions of 3 seconds.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write every sample to this JSON file.")
def main(seconds: int, repeat: int, algorithm: tuple[str, ...], quick: bool, output: Path | None) -> None:
    """Measure zramd and nbdkit's memory plugin with the same fio jobs, on this machine, in one run."""
    workloads = WORKLOADS[:2] if quick else WORKLOADS
    seconds, repeat = (3, 3) if quick else (seconds, repeat)
    commands = peers(list(algorithm))
    results: dict[str, dict[str, list[Sample]]] = {w.name: {name: [] for name in commands} for w in workloads}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        servers = {name: stack.enter_context(serving(name, cmd, Path(directory))) for name, cmd in commands.items()}
        for name, (_, socket) in servers.items():
            click.echo(f"filling {name}", err=True)
            fio(socket, Workload("write", "128k", 32))
        for turn in range(1, repeat + 1):
            for workload in workloads:
                for name, (pid, socket) in servers.items():
                    sample = measure(pid, socket, workload, seconds)
                    results[workload.name][name].append(sample)
                    click.echo(f"{turn}/{repeat} {workload.name:18} {name:14} {sample.iops:9.0f} IOPS", err=True)
    click.echo(
        f"{os.cpu_count()} CPUs, {seconds} s a measurement, medians of {repeat}; data {COMPRESSIBLE}% compressible"
    )
    for line in table(results):
        click.echo(line)
    if output is not None:
        samples = {w: {name: [asdict(s) for s in taken] for name, taken in by.items()} for w, by in results.items()}
        output.write_text(json.dumps(samples, indent=2) + "\n")


if __name__ == "__main__":
    main()
