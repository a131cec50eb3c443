"""Measure how the server bears clients that misbehave, beside one that does not.

A. 500 clients stall, each at one stage of handshake or transmission, and connect again when they are dropped.
B. 10,000 clients leave in the middle of something, while one compares all that it reads with a shadow.
C. Clients ask for more than they ever read, or write a byte a second.

Each part has a server of its own. The exit status is 1 if something leaked, or a good client failed.
"""

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import nbd
from harness import ERRORS, Display, Interrupt, Server, StepError, end_group, last_lines, messages, mib
from leaving import FILLED, FILLED_BYTES, Leavers, LostError, shadow
from peers import cpu_seconds, uri
from stalling import HANDSHAKE, NEVER_READING, SLOW_WRITING, TLS_HANDSHAKE, TRANSMISSION, HelperError, Stage, stalling

from zramd.layout import PAGE_SIZE
from zramd.nbd.limits import DEFAULT_LIMITS
from zramd.status.client import ask

SIZE = 256 << 20
COMPRESSIBLE = 60  # percent, of fio's data
WATCH = 0.25
"""Seconds between two looks at the server."""
IDLE_SECONDS = 15.0
"""How long threads, descriptors and connections may take to go."""
PROBE_SECONDS = 10.0
"""How long a new client tries to connect."""
MOST_PER_CLIENT = DEFAULT_LIMITS.memory + (1 << 20)
"""What a connection may take: its buffers, and something for thread and objects."""
MOST_LEAKED = 256
"""Bytes a connection, of memory of the server's own: less than any object that could be forgotten; and at least"""
MOST_GROWN = 2 << 20
"""bytes in all, since malloc's arenas come into use little by little."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The server at one moment. Sizes in bytes; `anonymous` is what of `resident` is not the pool."""

    when: float
    cpu: float
    resident: int
    anonymous: int
    threads: int
    descriptors: int

    @property
    def countable(self) -> tuple[int, int]:
        """What has to be as before once all have left."""
        return self.threads, self.descriptors


@dataclass(frozen=True, slots=True)
class Load:
    """The server over a while: the most of each, and CPU seconds a second."""

    resident: int
    anonymous: int
    threads: int
    descriptors: int
    cpu: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What fio had at one queue depth: requests a second, latencies in microseconds, and why it could not start."""

    iops: float
    p50: float
    p99: float
    slowest: float
    refused: dict[str, int]


@dataclass(frozen=True, slots=True)
class Probes:
    """Clients that come anew: milliseconds to connect and read a page, and how often that failed, by reason."""

    median: float
    slowest: float
    refused: dict[str, int]


@dataclass(slots=True)
class Span:
    """What was measured before the misbehaving clients came, while they were there, or when they had left."""

    speeds: dict[str, Speed] = field(default_factory=dict)
    loads: dict[str, Load] = field(default_factory=dict)
    probes: Probes | None = None


@dataclass(slots=True)
class Stalled:
    """The result of A and C.

    `connected` is a mean; `dropped` and `refused` are a second; `unread` is the most bytes in the kernel.
    """

    title: str
    before: Span
    during: Span
    after: Span
    idle_before: Facts
    idle_after: Facts
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    connected: float = 0.0
    dropped: float = 0.0
    refused: float = 0.0
    unread: int = 0


@dataclass(slots=True)
class Left:
    """The result of B. Slopes in bytes a connection."""

    seconds: float
    kinds: dict[str, int]
    operations: int
    samples: list[dict[str, Any]]
    resident_slope: float
    anonymous_slope: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done."""

    clients: int = 500
    seconds: int = 8
    probes: int = 20
    settle: float = 10.0
    leavers: int = 10_000
    rounds: int = 10


QUICK = Plan(clients=100, seconds=2, probes=5, settle=3.0, leavers=1000, rounds=10)


class Rig:
    """What every part uses; `failures` is what makes the exit status 1."""

    def __init__(self, interrupt: Interrupt, display: Display, plan: Plan, certificates: Path | None) -> None:
        self.interrupt = interrupt
        self.display = display
        self.plan = plan
        self.certificates = certificates
        self.failures: list[str] = []

    def fail(self, reason: str) -> None:
        """Note that something is wrong, and go on."""
        self.display.line(f"FAILED: {reason}")
        self.failures.append(reason)

    def sleep(self, seconds: float, watch: Callable[[], None] = lambda: None) -> None:
        """Wait, and call `watch` now and then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.interrupt.check()
            watch()
            time.sleep(min(WATCH, max(0.0, end - time.monotonic())))


class Subject(Server):
    """The server that is measured."""

    tcp: tuple[str, int]

    @classmethod
    def begin(cls, directory: Path, limits: dict[str, int], certificates: Path | None) -> "Subject":
        """Start it, with its sockets in `directory`."""
        unix, status, config = (directory / f"zramd.{suffix}" for suffix in ("nbd", "status", "toml"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, port = free.getsockname()
        tls = f'mode = "on"\ncertificates = {json.dumps(str(certificates))}' if certificates else ""
        config.write_text(
            f'[server]\nunix = {json.dumps(str(unix))}\ntcp = "{host}:{port}"\n'
            f"[tls]\n{tls}\n"
            "[limits]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items()) + "[zram0]\n"
            f"volatile = true\nsize = {SIZE}\nstatus = {json.dumps(str(status))}\n"
        )
        subject = cls.launch(directory, "--config", config)
        subject.tcp = (host, port)
        return subject

    def facts(self) -> Facts:
        """Look at its process."""
        self.require_alive()
        process = Path(f"/proc/{self.process.pid}")
        fields = dict(re.findall(r"^(\w+):\s+(\d+)", (process / "status").read_text(), re.MULTILINE))
        return Facts(
            when=time.monotonic(),
            cpu=cpu_seconds(self.process.pid),
            resident=int(fields["VmRSS"]) * 1024,
            anonymous=int(fields["RssAnon"]) * 1024,
            threads=int(fields["Threads"]),
            descriptors=len(os.listdir(process / "fd")),
        )

    def connections(self) -> int:
        """Ask how many clients the disk has."""
        return int(json.loads(ask(self.status, "json"))["connections"])

    def wait_idle(self, rig: Rig, expected: Facts, clients: int) -> tuple[Facts, str]:
        """Wait until all have gone but `clients`. Return how it is then, and what is left over."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            rig.interrupt.check()
            connected, facts = self.connections(), self.facts()
            if connected == clients and facts.countable == expected.countable:
                return facts, ""
            if time.monotonic() > deadline:
                return facts, (
                    f"{facts.threads} threads, {facts.descriptors} descriptors and {connected} connections are left "
                    f"after {IDLE_SECONDS:.0f} s, instead of {expected.threads}, {expected.descriptors} and {clients}"
                )
            time.sleep(0.05)


class Meter:
    """Adds looks at the server up to a Load."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._looks = [subject.facts()]

    def look(self) -> None:
        """Look now."""
        self._looks.append(self._subject.facts())

    def load(self) -> Load:
        """Return what was seen."""
        self.look()
        first, last = self._looks[0], self._looks[-1]
        return Load(
            resident=max(look.resident for look in self._looks),
            anonymous=max(look.anonymous for look in self._looks),
            threads=max(look.threads for look in self._looks),
            descriptors=max(look.descriptors for look in self._looks),
            cpu=(last.cpu - first.cpu) / max(last.when - first.when, 1e-6),
        )


@contextlib.contextmanager
def serving(rig: Rig, limits: dict[str, int]) -> Iterator[Subject]:
    """Run a server with a disk that holds data, and check that it ends well."""
    with tempfile.TemporaryDirectory(prefix="zramd-connections-") as name:
        directory = Path(name)
        subject = Subject.begin(directory, limits, rig.certificates)
        try:
            subject.wait_ready(rig.interrupt)
            fio(rig, subject, "--rw=write", "--bs=1m", "--iodepth=4")
            yield subject
        finally:
            subject.stop()
        said = [line for line in subject.log.read_text().splitlines() if "defect" in line or "Traceback" in line]
        for line in dict.fromkeys(said):
            rig.fail(f"the server said: {line}")


def fio(rig: Rig, subject: Subject, *options: str, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run one fio job on all of the disk, and return its result."""
    log = subject.log.with_name("fio.json")
    command = ["fio", "--name=good", "--ioengine=nbd", f"--uri={uri(subject.socket)}", f"--size={SIZE}"]
    command += ["--refill_buffers", f"--buffer_compress_percentage={COMPRESSIBLE}", "--output-format=json"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while process.poll() is None:
            rig.interrupt.check()
            watch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WATCH)
    finally:
        if process.poll() is None:
            end_group(process)
    subject.require_alive()
    if process.returncode:
        raise StepError(f"fio failed with status {process.returncode}: {last_lines(log, 1)}")
    text = log.read_text()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    return job


def speed(rig: Rig, subject: Subject, depth: int, watch: Callable[[], None]) -> Speed:
    """Have fio read and write pages at random; as it does not try to connect again, have it do that."""
    options = ["--rw=randrw", "--rwmixread=50", "--bs=4k", f"--iodepth={depth}", "--unified_rw_reporting=1"]
    options += ["--time_based", f"--runtime={rig.plan.seconds}"]
    deadline = time.monotonic() + PROBE_SECONDS
    refused: Counter[str] = Counter()
    while True:
        try:
            mixed = fio(rig, subject, *options, watch=watch)["mixed"]
        except StepError as error:
            refused[str(error)] += 1
            if time.monotonic() > deadline:
                raise
        else:
            latency = mixed["clat_ns"]
            p50, p99 = (latency["percentile"][name] / 1000 for name in ("50.000000", "99.000000"))
            return Speed(mixed["iops"], p50, p99, latency["max"] / 1000, dict(refused))


def probe(rig: Rig, subject: Subject) -> Probes:
    """Connect again and again, and read a page each time."""
    times: list[float] = []
    refused: Counter[str] = Counter()
    for number in range(rig.plan.probes):
        started = time.monotonic()
        while True:
            rig.interrupt.check()
            client = nbd.NBD()
            try:
                client.connect_uri(uri(subject.socket))
                client.pread(PAGE_SIZE, number * PAGE_SIZE)
            except nbd.Error as error:
                refused[error.string] += 1
                if time.monotonic() - started > PROBE_SECONDS:
                    raise StepError(f"a new client could not connect for {PROBE_SECONDS:.0f} s: {error}") from error
                time.sleep(0.01)
            else:
                times.append((time.monotonic() - started) * 1000)
                client.shutdown()
                break
        rig.sleep(0.1)
    return Probes(statistics.median(times), max(times), dict(refused))


def span(rig: Rig, subject: Subject, title: str, watch: Callable[[], None] = lambda: None) -> Span:
    """Measure the good client: at depth 1, at depth 16, and coming anew."""
    result = Span()
    for depth in (1, 16):
        meter = Meter(subject)

        def look(meter: Meter = meter) -> None:
            meter.look()
            watch()

        name = f"qd{depth}"
        result.speeds[name] = taken = speed(rig, subject, depth, look)
        result.loads[name] = meter.load()
        rig.display.line(
            f"  {title}, {name}: {taken.iops:,.0f} IOPS, p99 {taken.p99:,.0f} us, slowest {taken.slowest / 1000:.0f} ms"
        )
    result.probes = probe(rig, subject)
    return result


def stall(rig: Rig, title: str, limits: dict[str, int], stages: list[Stage], clients: int, pause: float) -> Stalled:
    """Measure a good client alone, while others stall, and alone again: the machine may have changed meanwhile."""
    rig.display.line(f"{title}: {clients} clients")
    with serving(rig, limits) as subject:
        # The first connections make what stays: arenas, caches, the thread's own.
        probe(rig, subject)
        rig.sleep(0.5)
        idle = subject.facts()
        before = span(rig, subject, "alone")
        pressures: list[tuple[float, dict[str, Any]]] = []
        with stalling(subject.socket, stages, clients, pause) as crowd:
            meter = Meter(subject)

            def watch() -> None:
                pressures.append((time.monotonic(), crowd.ask()))
                meter.look()

            rig.sleep(rig.plan.settle, watch)
            settled = meter.load()
            del pressures[: len(pressures) // 2]
            during = span(rig, subject, "beside them", watch)
            during.loads["nobody else"] = settled
        left, leak = subject.wait_idle(rig, idle, 0)
        if leak:
            rig.fail(f"{title}: {leak}")
        after = span(rig, subject, "alone again")
    result = Stalled(title, before, during, after, idle, left)
    _add_up(result, stages, pressures)
    grown = max(load.anonymous for load in during.loads.values()) - idle.anonymous
    threads = max(load.threads for load in during.loads.values())
    if grown > threads * MOST_PER_CLIENT:
        rig.fail(f"{title}: {mib(grown)} more memory for {threads} threads")
    return result


def _add_up(result: Stalled, stages: list[Stage], pressures: list[tuple[float, dict[str, Any]]]) -> None:
    (start, first), (end, last) = pressures[0], pressures[-1]
    seconds = end - start
    for name in (stage.name for stage in stages):
        result.stages[name] = {
            "connected": statistics.fmean(pressure["connected"].get(name, 0) for _, pressure in pressures),
            **{key: (last[key].get(name, 0) - first[key].get(name, 0)) / seconds for key in ("dropped", "refused")},
        }
    result.unread = max(pressure["unread"] for _, pressure in pressures)
    for key in ("connected", "dropped", "refused"):
        setattr(result, key, sum(stage[key] for stage in result.stages.values()))


def leave(rig: Rig) -> Left:
    """Have clients leave in the middle of something."""
    plan = rig.plan
    rig.display.line(f"B: {plan.leavers:,} clients that leave")
    with serving(rig, {}) as subject, shadow(uri(subject.socket)) as good:
        reader = nbd.NBD()
        reader.connect_uri(uri(subject.socket))
        leavers = Leavers(subject.socket, subject.tcp, reader)
        reader.pwrite(os.urandom(FILLED_BYTES), FILLED)
        leavers.clear_torn()
        operations = _require_good(good.ask())
        start, _ = subject.wait_idle(rig, subject.facts(), 2)
        samples = [_sample(0, start, 2)]
        kinds = dict.fromkeys(leavers.kinds, 0)
        started = time.monotonic()
        every = plan.leavers // plan.rounds
        for number in range(plan.leavers):
            rig.interrupt.check()
            rig.display.progress(f"{number:,} left")
            kinds[leavers.leave(number)] += 1
            if (number + 1) % every == 0:
                facts, leak = subject.wait_idle(rig, start, 2)
                if leak:
                    rig.fail(f"B: after {number + 1:,} clients {leak}")
                samples.append(_sample(number + 1, facts, subject.connections()))
                leavers.require_nothing_torn()
                operations = _require_good(good.ask())
                rig.display.line(
                    f"  {number + 1:7,} left: {facts.threads} threads, {facts.descriptors} descriptors, "
                    f"{samples[-1]['connections']} connections, {facts.resident >> 10:,} KiB resident, "
                    f"{facts.anonymous >> 10:,} KiB of its own; {operations:,} operations of the good client"
                )
        seconds = time.monotonic() - started
        reader.shutdown()
    counted = samples[1:]
    slopes = [_slope([(s["left"], s[key]) for s in counted]) for key in ("resident", "anonymous")]
    grown = counted[-1]["anonymous"] - counted[0]["anonymous"]
    if slopes[1] > MOST_LEAKED and grown > MOST_GROWN:
        rig.fail(f"B: {slopes[1]:.0f} bytes of memory are lost with each connection")
    return Left(seconds, kinds, operations, samples, slopes[0], slopes[1])


def _require_good(answer: dict[str, Any]) -> int:
    """Return how much the good client has done.

    Raises:
        LostError: it failed.
    """
    if answer["failure"]:
        raise LostError(f"the good client: {answer['failure']}")
    return int(answer["operations"])


def _sample(left: int, facts: Facts, connections: int) -> dict[str, Any]:
    return {"left": left, "connections": connections, **asdict(facts)}


def _slope(points: list[tuple[int, int]]) -> float:
    """Return the slope of the straight line that is nearest to the points."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def stalled_table(result: Stalled) -> Iterator[str]:
    """Yield the lines of a report."""
    spans = {"alone": result.before, "beside them": result.during, "alone again": result.after}
    yield f"\n{result.title}"
    yield f"  {'good client':20}{'IOPS':>9}{'p50 us':>9}{'p99 us':>9}{'slowest ms':>12}{'server CPU':>12}"
    for name in result.before.speeds:
        for when, taken in spans.items():
            found = taken.speeds[name]
            yield (
                f"  {name + ' ' + when:20}{found.iops:9,.0f}{found.p50:9,.0f}{found.p99:9,.0f}"
                f"{found.slowest / 1000:12,.1f}{taken.loads[name].cpu:12.0%}"
                + (f"  (refused {sum(found.refused.values())} times)" if found.refused else "")
            )
    for when, taken in spans.items():
        if taken.probes:
            yield (
                f"  a new client {when}: {taken.probes.median:.1f} ms to connect and read (median), "
                f"{taken.probes.slowest:.1f} ms at most, refused {sum(taken.probes.refused.values())} times"
            )
            for reason, count in taken.probes.refused.items():
                yield f"    {count} times: {reason}"
    yield (
        f"  those that stall: {result.connected:.0f} connected, {result.dropped:.0f} dropped and "
        f"{result.refused:.0f} refused a second, {mib(result.unread)} in the kernel that they do not read"
    )
    for name, stage in result.stages.items():
        yield f"    {name:34}{stage['connected']:6.0f}{stage['dropped']:9.1f}{stage['refused']:9.1f}"
    yield f"  {'server':20}{'resident':>10}{'of its own':>12}{'threads':>9}{'descriptors':>13}{'CPU':>7}"
    most = result.during.loads
    rows: list[tuple[str, Facts | Load]] = [("before", result.idle_before)]
    rows += [(f"{name}, at most", load) for name, load in most.items()]
    for name, row in [*rows, ("after", result.idle_after)]:
        cpu = f"{row.cpu:7.0%}" if isinstance(row, Load) else ""
        yield f"  {name:20}{mib(row.resident):>10}{mib(row.anonymous):>12}{row.threads:9}{row.descriptors:13}{cpu}"


def left_table(result: Left) -> Iterator[str]:
    """Yield the lines of a report."""
    first, last = result.samples[1], result.samples[-1]
    yield "\nB. Clients that leave"
    yield f"  {sum(result.kinds.values()):,} in {result.seconds:.0f} s; in equal shares {', '.join(result.kinds)}"
    yield f"  {'':14}{'threads':>9}{'descriptors':>13}{'connections':>13}{'resident':>14}{'of its own':>14}"
    for sample in (result.samples[0], first, last):
        yield (
            f"  {sample['left']:7,} left  {sample['threads']:9}{sample['descriptors']:13}{sample['connections']:13}"
            f"{sample['resident'] >> 10:10,} KiB{sample['anonymous'] >> 10:10,} KiB"
        )
    yield (
        f"  from {first['left']:,} to {last['left']:,}: {result.resident_slope:+.0f} bytes a connection resident, "
        f"{result.anonymous_slope:+.0f} of its own; the good client did {result.operations:,} operations, all right"
    )


def run(rig: Rig, parts: str) -> dict[str, Any]:
    """Measure the parts; return all results."""
    plan = rig.plan
    stages = [*HANDSHAKE, *(TLS_HANDSHAKE if rig.certificates else []), *TRANSMISSION]
    raised = {"connections": 2 * plan.clients, "handshakes": plan.clients + 100}
    results: dict[str, Any] = {}
    tables: list[str] = []
    if "A" in parts:
        variants: list[tuple[str, dict[str, int], float]] = [
            ("A. Clients that stall: default limits, again after 1 s", {}, 1.0),
            ("A. Clients that stall: default limits, again at once", {}, 0.0),
            (f"A. Clients that stall: limits {raised}, again after 1 s", raised, 1.0),
        ]
        stalled = [stall(rig, title, limits, stages, plan.clients, pause) for title, limits, pause in variants]
        results["A"] = [asdict(result) for result in stalled]
        tables += [line for result in stalled for line in stalled_table(result)]
    if "B" in parts:
        left = leave(rig)
        results["B"] = asdict(left)
        tables += left_table(left)
    if "C" in parts:
        slow = stall(rig, "C. Clients that stop reading", {}, [NEVER_READING, SLOW_WRITING], 16, 1.0)
        results["C"] = asdict(slow)
        tables += stalled_table(slow)
    for line in tables:
        rig.display.line(line)
    return results


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Also write everything to this JSON file.")
@click.option("--quick", is_flag=True, help="100 clients that stall, 1,000 that leave, measurements of 2 seconds.")
@click.option("--only", type=click.Choice(["A", "B", "C"]), help="One part.")
@click.option("--tls", type=click.Path(path_type=Path, exists=True), help="Certificates: stall in TLS handshakes too.")
def main(output: Path | None, quick: bool, only: str | None, tls: Path | None) -> None:
    """Measure how the server bears clients that stall (A), leave (B), or stop reading (C), beside a good one."""
    interrupt, display = Interrupt(), Display()
    interrupt.listen()
    rig = Rig(interrupt, display, QUICK if quick else Plan(), tls.resolve() if tls else None)
    started, busy = time.monotonic(), os.getloadavg()[0]
    results: dict[str, Any] = {}
    try:
        results = run(rig, only or "ABC")
    except (*ERRORS, HelperError, LostError, nbd.Error) as error:
        for message in messages(error) if isinstance(error, ERRORS) else [str(error)]:
            rig.fail(message)
    if interrupt.signal:
        sys.exit(128 + interrupt.signal)
    display.line(f"\n{os.cpu_count()} CPUs, load {busy:.1f} at the start; {time.monotonic() - started:.0f} s")
    if output is not None:
        output.write_text(json.dumps({**results, "failures": rig.failures}, indent=2) + "\n")
    display.line(f"failed: {len(rig.failures)}" if rig.failures else "nothing leaked, and no good client failed")
    sys.exit(1 if rig.failures else 0)


if __name__ == "__main__":
    main()
