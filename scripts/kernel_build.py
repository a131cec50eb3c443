"""Build Linux on zramd with chain sizes 4 and 8, on kernel zram and on tmpfs, and compare what that took.

It is the synthetic test of Linux's Documentation/mm/zsmalloc.rst. Whatever happens, nothing stays mounted, attached,
allocated or running.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from harness import (
    STOP_SECONDS,
    Display,
    Interrupt,
    StepError,
    Steps,
    make_directory,
    mib,
    parse_mm_stat,
    run_to_end,
    serve,
    stored,
    unmount_at_end,
)

from zramd.attach.attachment import run_tool
from zramd.device.counters import MmStat
from zramd.layout import PAGE_SIZE
from zramd.sizes import parse_size
from zramd.status.client import ask

CONTROL = Path("/sys/class/zram-control")
CHAIN_SIZES = {"chain4": 4, "chain8": 8}
RUNS = (*CHAIN_SIZES, "kernel", "tmpfs")
WRITE_BACK = "write the build back"
BUILD = ("configure", "compile", WRITE_BACK)
# The document does not say what it compiled; the mail that proposed the patch, with the same numbers, does.
DOCUMENT = {
    4: asdict(MmStat(1691783168, 628083717, 655175680, 0, 655175680, 60, 0, 34048, 34049)),
    8: asdict(MmStat(1691803648, 627793930, 641703936, 0, 641703936, 60, 0, 33591, 33591)),
}


class SkippedError(Exception):
    """A run that this machine cannot do; the message says why."""


@dataclass(frozen=True)
class Result:
    """What a run took: seconds of each step, mm_stat in its own units, and the Total row of `classes`."""

    seconds: dict[str, float]
    mm_stat: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    @property
    def build(self) -> float:
        """Seconds from the unpacked tree to a kernel that is written back."""
        return sum(self.seconds[step] for step in BUILD)


class KernelZram:
    """A kernel zram device of our own."""

    def __init__(self) -> None:
        try:
            self._number = (CONTROL / "hot_add").read_text().strip()
        except FileNotFoundError:
            raise SkippedError("there is no kernel zram: modprobe zram") from None
        self.path = Path(f"/dev/zram{self._number}")
        self._sysfs = Path(f"/sys/block/zram{self._number}")

    def set_up(self, size: int, algorithm: str) -> None:
        """Give it its size in bytes and its algorithm."""
        offered = (self._sysfs / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
        if algorithm not in offered:
            raise SkippedError(f"kernel zram here has no {algorithm}, only {', '.join(offered)}")
        (self._sysfs / "comp_algorithm").write_text(algorithm)
        (self._sysfs / "disksize").write_text(str(size))

    def mm_stat(self) -> MmStat:
        """Return its counters."""
        return parse_mm_stat((self._sysfs / "mm_stat").read_text())

    def remove(self) -> None:
        """Take it away; udev may have it open for a moment."""
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                (CONTROL / "hot_remove").write_text(self._number)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise StepError(f"cannot remove {self.path}: {error.strerror}") from error
                time.sleep(0.05)
            else:
                return


def measure(name: str, config: str, size: int, algorithm: str, interrupt: Interrupt, display: Display) -> Result:
    """Build Linux in one of the places, and take the place away."""
    with contextlib.ExitStack() as undo:
        directory, mountpoint = make_directory(undo, "kernel-build")
        server = kernel = device = None
        if name in CHAIN_SIZES:
            options = ["--size", str(size), "--algorithm", algorithm, "--chain-size", str(CHAIN_SIZES[name])]
            server, attached = serve(undo, directory, interrupt, *options)
            device = attached.path
        elif name == "kernel":
            kernel = KernelZram()
            undo.callback(kernel.remove)
            kernel.set_up(size, algorithm)
            device = kernel.path
        unmount_at_end(undo, mountpoint, display)
        display.line(f"{name}: {device or 'tmpfs'}")

        def watch() -> str:
            if server:
                return server.summary()
            return stored(kernel.mm_stat()) if kernel else f"{mib(shutil.disk_usage(mountpoint).used)} used"

        steps = Steps(directory, interrupt, display, watch)
        if device:
            steps.make_ext4(device, mountpoint)
            steps.times.clear()
        else:
            run_tool(["mount", "-t", "tmpfs", "-o", f"noatime,size={size}", "tmpfs", mountpoint])
        steps.build_linux(mountpoint / "linux", config)
        steps.step(WRITE_BACK, ["sync", "-f", mountpoint])
        seconds = {title.partition(" (")[0]: taken for title, taken in steps.times.items()}
        if server:
            return Result(seconds, asdict(server.mm_stat()), total_row(ask(server.status, "classes")))
        return Result(seconds, asdict(kernel.mm_stat()) if kernel else {})


def total_row(classes: str) -> dict[str, int]:
    """Return the last row of the table of size classes, by the names of its columns."""
    lines = classes.splitlines()
    names = [name for name in lines[0].split() if name not in ("class", "size", "pages_per_zspage")]
    return dict(zip(names, map(int, lines[-1].split()[1:]), strict=True))


def table(heading: str, columns: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield the lines of a table: a row for each key, with a dash in the columns that lack it."""
    yield ""
    yield f"{heading:22}" + "".join(f"{name:>16}" for name in columns)
    for title in dict.fromkeys(key for column in columns.values() for key in column):
        yield f"{title:22}" + "".join(f"{column.get(title, '-'):>16}" for column in columns.values())


def times(result: Result, reference: Result | None) -> dict[str, str]:
    """Return a column of seconds, and the ratio of the whole build to that of the reference."""
    column = {title: f"{seconds:.1f}" for title, seconds in result.seconds.items()}
    column["configure to end"] = f"{result.build:.1f}"
    if reference:
        column["that / tmpfs"] = f"{result.build / reference.build:.2f}"
    return column


def difference(ours: int, theirs: int) -> str:
    """Return ours less theirs, and that as a part of theirs."""
    return f"{ours - theirs:+,}" + (f" {(ours - theirs) / theirs:+.2%}" if theirs else "")


def saved(chain4: Mapping[str, int], chain8: Mapping[str, int]) -> str:
    """Return what chain size 8 saves against 4."""
    less = {name: chain4[name] - chain8[name] for name in ("mem_used_total", "mem_used_max")}
    return " and ".join(
        f"{size // PAGE_SIZE:,} pages of {name} ({size / chain4[name]:.2%})" for name, size in less.items()
    )


def report(results: dict[str, Result]) -> Iterator[str]:
    """Yield the lines of the report."""
    yield from table("seconds", {name: times(result, results.get("tmpfs")) for name, result in results.items()})
    stats = {name: result.mm_stat for name, result in results.items()}
    columns = {name: {key: f"{value:,}" for key, value in stat.items()} for name, stat in stats.items()}
    if {"chain8", "kernel"} <= stats.keys():
        pairs = zip(stats["chain8"].items(), stats["kernel"].values(), strict=True)
        columns["  chain8 - kernel"] = {key: difference(ours, theirs) for (key, ours), theirs in pairs}
    yield from table("mm_stat", columns)
    yield from table(
        "classes, Total",
        {name: {key: f"{value:,}" for key, value in result.classes.items()} for name, result in results.items()},
    )
    yield ""
    yield "mem_used_max is the peak. Kernel zram has chain size 8, unless CONFIG_ZSMALLOC_CHAIN_SIZE says otherwise."
    if CHAIN_SIZES.keys() <= stats.keys():
        yield f"Chain size 8 saves {saved(stats['chain4'], stats['chain8'])}."
        peaks = [f"{DOCUMENT[size]['mem_used_max']:,} bytes with chain size {size}" for size in (4, 8)]
        yield f"The kernel's document: {saved(DOCUMENT[4], DOCUMENT[8])}:"
        yield f"at most {', '.join(peaks)}, for {DOCUMENT[8]['compr_data_size'] / 1e6:.0f} MB compressed."
        yield "That was Linux 6.0 with lzo-rle, on another machine: only the relation compares."


def run(options: argparse.Namespace, interrupt: Interrupt, display: Display) -> None:
    """Do the runs, and report those that came to their end."""
    results: dict[str, Result] = {}
    try:
        for name in options.only:
            try:
                results[name] = measure(name, options.config, options.size, options.algorithm, interrupt, display)
            except SkippedError as reason:
                display.line(f"{name} is skipped: {reason}")
    finally:
        if results:
            for line in report(results):
                display.line(line)
            if options.output:
                settings = {name: getattr(options, name) for name in ("config", "size", "algorithm")}
                runs = {name: asdict(result) for name, result in results.items()}
                text = json.dumps({**settings, "kernel": os.uname().release, "runs": runs}, indent=2)
                options.output.write_text(text + "\n")


def parse_runs(text: str) -> list[str]:
    """Return the runs that a comma-separated list names, in the order of RUNS."""
    names = text.split(",")
    if unknown := set(names).difference(RUNS):
        raise argparse.ArgumentTypeError(f"no run {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    return [name for name in RUNS if name in names]


def size_option(text: str) -> int:
    """Return the bytes that a size means."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    """Run the builds; return the exit status."""
    parser = argparse.ArgumentParser(prog="kernel-build", description="Compile Linux on zramd, kernel zram and tmpfs.")
    parser.add_argument("--config", default="tinyconfig", help="make target that configures (default: %(default)s)")
    parser.add_argument("--size", default="4G", type=size_option, help="of each device; it needs 2G (default: 4G)")
    parser.add_argument("--algorithm", default="lz4", help="compression algorithm (default: %(default)s)")
    parser.add_argument(
        "--only", default=list(RUNS), type=parse_runs, metavar="RUN,...", help=f"some of {', '.join(RUNS)}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results there, as JSON")
    return run_to_end("kernel-build", partial(run, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
