"""Writeback to files and block devices that are full, fail or hang, with servers killed meanwhile.

In each scenario fio writes data with a checksum in every block, and verifies all of them in the end. Which pages a
fault must cost is worked out from the page table in memory and the place of the fault, and compared with what is read.
"""

import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import nbd
from harness import Interrupt, StepError
from measuring import MIB, SHARED_MEMORY, Progress, ending_well
from stores import (
    Disk,
    InBackground,
    anonymous_memory,
    child_of,
    faulty_file,
    loop_device,
    make_file,
    small_file_system,
)

from tests.crash.client import Client
from zramd.layout import PAGE_SIZE
from zramd.status.client import StatusError

SLICES = 5
SLICE = 100 * MIB
"""Of what fio writes, so many bytes are written at a time."""
CLIENT_PAGES = 4096
"""That a client of its own changes, which knows what each may be after a kill."""
FAULTS = 12
"""Places that fail, of up to so many bytes:"""
LARGEST_FAULT = 64 << 10
SMALL = 64 * MIB
MOST_GROWTH = 8 * MIB
"""Of memory beside the pool, by writeback of everything and reading it back."""


@dataclass(frozen=True, slots=True)
class Lab:
    """Where a scenario is played: one directory in memory, for the disk, and one on a disk, for its store."""

    memory: Path
    storage: Path
    interrupt: Interrupt
    progress: Progress
    generator: random.Random

    def disk(self, size: int, *options: str) -> Disk:
        """Return a disk that is not yet served."""
        return Disk(self.memory, size, self.interrupt, *options)


Scenario = Callable[[Lab, ExitStack], str]


def require(holds: object, what: str) -> None:
    """Check something.

    Raises:
        StepError: it does not hold.
    """
    if not holds:
        raise StepError(f"does not hold: {what}")


def kills(lab: Lab, undo: ExitStack, store: Path, number: int = 8) -> str:
    """Kill the server in the middle of writeback, again and again, while a client writes; start it anew each time."""
    disk = lab.disk(SLICES * SLICE + CLIENT_PAGES * PAGE_SIZE)
    undo.callback(disk.stop)
    client = Client(lab.generator.randrange(1 << 32), SLICES * SLICE // PAGE_SIZE, CLIENT_PAGES)
    disk.start()
    disk.say(f"backing_dev {store}")
    for part in range(SLICES):
        disk.write(part * SLICE, SLICE)
    midway = 0
    for life in range(number):
        part = life % SLICES
        if life:
            disk.write(part * SLICE, SLICE)
        before = disk.backed
        with InBackground(partial(client.run, disk.server.unix, disk.server.has_died), partial(_write_back_on, disk)):
            disk.server.has_died(lab.generator.uniform(0.2, 2))
            at_kill = disk.backed
            disk.server.kill()
        disk.kill()
        disk.start()
        midway += before < at_kill
        with disk.client() as handle:
            start = SLICES * SLICE
            size = CLIENT_PAGES * PAGE_SIZE
            found = b"".join(handle.pread(MIB, at) for at in range(start, start + size, MIB))
        client.check(bytes(start) + found)
        disk.verify(part * SLICE, SLICE)
        lab.progress.note(f"  kill {life + 1} of {number}, {at_kill - before} pages after writeback began")
    stopped = disk.write_back()
    require(not stopped, f"in the end everything can be written back: {stopped}")
    for part in range(SLICES):
        disk.verify(part * SLICE, SLICE)
    require(disk.failed_reads == 0, "no page failed to be read")
    require(midway, "a kill hit writeback")
    return (
        f"{number} kills, {midway} in the middle of writeback; {client.answered:,} requests answered and none lost; "
        f"fio verified {SLICES * SLICE // MIB} MiB, all of {disk.backed:,} pages written back"
    )


def _write_back_on(disk: Disk) -> None:
    while not disk.server.has_died():
        disk.write_back()
        time.sleep(0.05)


def kills_on_a_file(lab: Lab, undo: ExitStack) -> str:
    """Kill the server again and again while it writes back to a file."""
    return kills(lab, undo, make_file(lab.storage / "store", 2048 * MIB))


def kills_on_a_block_device(lab: Lab, undo: ExitStack) -> str:
    """Do the same on a block device."""
    return kills(lab, undo, undo.enter_context(loop_device(make_file(lab.storage / "store", 2048 * MIB))), 4)


def full_store(lab: Lab, undo: ExitStack) -> str:
    """Fill a store that is too small: writeback stops, and goes on when pages are gone."""
    disk = lab.disk(3 * SLICE)
    undo.callback(disk.stop)
    disk.start()
    disk.say(f"backing_dev {make_file(lab.storage / 'store', SMALL)}")
    disk.write(0, 3 * SLICE)
    stopped = disk.write_back()
    require(stopped.startswith("ENOSPC"), f"a full store is named: {stopped!r}")
    first = disk.backed
    # The largest objects go first: at least so many pages fit.
    require(first * PAGE_SIZE > SMALL * 3 // 4, f"the store was filled: {first} pages")
    disk.verify(0, 3 * SLICE)
    disk.write(SLICE, SLICE)
    with disk.client() as client:
        client.trim(SLICE, 0)
    stopped = disk.write_back()
    require(disk.places().keys() and min(disk.places()) >= SLICE // PAGE_SIZE, "what was trimmed is gone")
    disk.verify(SLICE, 2 * SLICE)
    return f"{first:,} pages filled {SMALL // MIB} MiB; then ENOSPC, and reads, writes and trims went on"


def full_file_system(lab: Lab, undo: ExitStack) -> str:
    """Fill the file system that a sparse store is on; then make room."""
    disk = lab.disk(2 * SLICE)
    undo.callback(disk.stop)
    mountpoint = undo.enter_context(small_file_system(lab.storage, 3 * SMALL))
    undo.callback(disk.stop)
    filler = mountpoint / "filler"
    filler.write_bytes(bytes(2 * SMALL))
    disk.start()
    disk.say(f"backing_dev {make_file(mountpoint / 'store', 1024 * MIB)}")
    disk.write(0, 2 * SLICE)
    stopped = disk.write_back()
    require(stopped.startswith("ENOSPC"), f"a full file system is named: {stopped!r}")
    first = disk.backed
    require(first, "something was written back")
    disk.verify(0, 2 * SLICE)
    filler.unlink()
    stopped = disk.write_back()
    require(not stopped, f"there is room again: {stopped}")
    disk.verify(0, 2 * SLICE)
    require(disk.failed_reads == 0, "no page failed to be read")
    return f"ENOSPC after {first:,} pages; with room again all {disk.backed:,}"


def _faulty(lab: Lab, undo: ExitStack, kinds: tuple[str, ...], *, block_device: bool) -> str:
    """Let places of the store fail to be read, and then to be written."""
    disk = lab.disk(SMALL)
    undo.callback(disk.stop)
    faulty = undo.enter_context(faulty_file(lab.storage, 4 * SMALL))
    store = undo.enter_context(loop_device(faulty.path)) if block_device else faulty.path
    undo.callback(disk.stop)
    undo.callback(faulty.heal)
    disk.start()
    disk.say(f"backing_dev {store}")
    disk.write(0, SMALL)
    pages = disk.pages
    data = disk.contents(pages)
    for error in ("EIO", "ENOSPC"):
        faulty.fail(writes=[(error, 0, 4 * SMALL)])
        stopped = disk.write_back()
        require(stopped.startswith(error), f"{error} is named: {stopped!r}")
        require(not disk.backed, "nothing counts as written back")
        require(disk.contents(pages) == data, "everything is still in memory")
    # What a write before had no fault for is there; what had one, and all after it, is not.
    faulty.fail(writes=[("EIO", SMALL // 4, 4 * SMALL)])
    stopped = disk.write_back()
    require(stopped.startswith("EIO") and disk.backed, f"writeback stops at the first fault: {stopped!r}")
    require(disk.contents(pages) == data, "nothing was lost by that")
    faulty.heal()
    stopped = disk.write_back()
    require(not stopped and disk.backed == pages, f"everything is written back: {stopped}")
    lost = {kind: _fail_reads(lab, disk, faulty.fail, kind, data) for kind in kinds}
    faulty.heal()
    require(disk.contents(pages) == data, "what could not be read is there when the store is well again")
    disk.verify(0, SMALL)
    return ", ".join(f"{kind}: {count:,} of {pages:,} pages" for kind, count in lost.items())


def _fail_reads(lab: Lab, disk: Disk, fail: Callable[..., None], kind: str, data: list[bytes | None]) -> int:
    """Let places fail to be read, and compare which pages that costs with which it must cost. Return how many."""
    generator, places, before = lab.generator, disk.places(), disk.failed_reads
    end = max(stop for _, stop in places.values())
    starts = [generator.randrange(end) for _ in range(FAULTS)]
    faults = [(kind, start, start + generator.randrange(1, LARGEST_FAULT)) for start in starts]
    fail(reads=faults)

    def meets(start: int, stop: int) -> bool:
        if kind == "damaged":
            return any(first < stop and start < last for _, first, last in faults)
        first_block, end_block = start & -PAGE_SIZE, (stop + PAGE_SIZE - 1) & -PAGE_SIZE
        return any(first < end_block and first_block < last for _, first, last in faults)

    expected = {page for page, (start, stop) in places.items() if meets(start, stop)}
    found = disk.contents(disk.pages)
    failed = {page for page, content in enumerate(found) if content is None}
    require(failed == expected, f"{kind} costs {len(expected)} pages, not {sorted(failed ^ expected)[:5]} ...")
    require(all(found[page] == data[page] for page in range(disk.pages) if page not in failed), "others are whole")
    require(disk.failed_reads - before == len(failed), f"{len(failed)} are counted, not {disk.failed_reads - before}")
    mended = generator.sample(sorted(failed), 3)
    with disk.client() as client:
        for page in mended:
            try:
                client.pwrite(b"part", page * PAGE_SIZE + 100)
            except nbd.Error as error:
                require(error.errno == "EIO", f"a write of a part of such a page fails: {error}")
            else:
                raise StepError("a part of a page that cannot be read was written")
            client.pwrite(data[page] or b"", page * PAGE_SIZE)
            require(client.pread(PAGE_SIZE, page * PAGE_SIZE) == data[page], "a write of all of it mends it")
    # Writeback and cleaning go on around the faults.
    require(not disk.write_back(), "what was mended can be written back")
    return len(failed)


def faults_of_a_file(lab: Lab, undo: ExitStack) -> str:
    """Fail to read and to write at some places of a file: errors, short reads, damage."""
    return _faulty(lab, undo, ("EIO", "short", "damaged"), block_device=False)


def faults_of_a_block_device(lab: Lab, undo: ExitStack) -> str:
    """Fail to read and to write at some places of a block device."""
    return _faulty(lab, undo, ("EIO",), block_device=True)


def hanging_store(lab: Lab, undo: ExitStack) -> str:
    """Let the store hang: while one client waits for it, others, the counters and a kill of the server do not."""
    disk = lab.disk(SMALL)
    faulty = undo.enter_context(faulty_file(lab.storage, 4 * SMALL))
    undo.callback(disk.stop)
    undo.callback(faulty.heal)
    disk.start()
    disk.say(f"backing_dev {faulty.path}")
    disk.write(0, SMALL)
    half = disk.pages // 2
    disk.say(f"writeback page_indexes=0-{half - 1}")
    longest = 0.0
    for what in ("reads", "writes"):
        faulty.fail(**{what: [("hang", 0, 4 * SMALL)]})
        waiting = threading.Thread(
            target=disk.contents if what == "reads" else disk.write_back, args=(1,)[: what == "reads"]
        )
        waiting.start()
        deadline = time.monotonic() + 3
        with disk.client() as client:
            while time.monotonic() < deadline:
                began = time.monotonic()
                # The upper half may be on its way to the store, and stays readable.
                client.pread(PAGE_SIZE, lab.generator.randrange(half, disk.pages) * PAGE_SIZE)
                disk.ask("json")
                longest = max(longest, time.monotonic() - began)
        require(waiting.is_alive(), f"who needs the store waits ({what})")
        faulty.heal()
        waiting.join()
    disk.verify(0, SMALL)
    faulty.fail(reads=[("hang", 0, 4 * SMALL)])
    with InBackground(partial(_expect_no_answer, disk)):
        time.sleep(0.2)
        disk.server.kill()
        # The kernel ends no process of which a request is with a file system.
        faulty.heal()
        disk.kill()
    disk.start()
    disk.verify(0, SMALL)
    return f"others waited {longest * 1000:.0f} ms at most; a kill of the server meanwhile lost nothing"


def _expect_no_answer(disk: Disk) -> None:
    try:
        with disk.client() as client:
            client.pread(PAGE_SIZE, 0)
    except nbd.Error:
        return
    raise StepError("a store that hangs has answered")


def swap_server(lab: Lab, undo: ExitStack) -> str:
    """Serve with --swap: memory beside the pool grows by little, however much is written back and read."""
    disk = lab.disk(SLICES * SLICE, "--swap")
    # A tmpfs of its own, that is never swapped out, where the kernel has such.
    undo.callback(lambda: subprocess.run(["umount", lab.memory / "state"], capture_output=True, check=False))
    undo.callback(disk.stop)
    disk.start()
    disk.say(f"backing_dev {make_file(lab.storage / 'store', 2048 * MIB)}")
    server = child_of(disk.server.pid)
    for part in range(SLICES):
        disk.write(part * SLICE, SLICE)
    before = anonymous_memory(server)
    pool = int(disk.ask("mm_stat").split()[2])
    stopped = disk.write_back()
    require(not stopped, f"everything is written back: {stopped}")
    after = anonymous_memory(server)
    for part in range(SLICES):
        disk.verify(part * SLICE, SLICE)
    at_end = anonymous_memory(server)
    require(at_end - before < MOST_GROWTH, f"{(at_end - before) / MIB:.1f} MiB more than before are too much")
    left = int(disk.ask("mm_stat").split()[2])
    return (
        f"the pool shrank from {pool // MIB} to {left / MIB:.1f} MiB; other memory was {before / MIB:.1f} MiB before, "
        f"{after / MIB:.1f} after writeback, {at_end / MIB:.1f} after reading all of it"
    )


SCENARIOS: dict[str, Scenario] = {
    "kills-file": kills_on_a_file,
    "kills-block-device": kills_on_a_block_device,
    "full-store": full_store,
    "full-file-system": full_file_system,
    "faults-file": faults_of_a_file,
    "faults-block-device": faults_of_a_block_device,
    "hanging": hanging_store,
    "swap": swap_server,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(SCENARIOS)), metavar="[SCENARIO]...")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of the moments of kills and the places of faults."
)
@click.option("--list", "listed", is_flag=True, help="Only say which scenarios there are.")
@click.option(
    "--storage",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="/var/tmp",  # noqa: S108 (a place on a disk, and a directory of its own in it)
    show_default=True,
    help="Where backing stores are made: on a disk.",
)
def main(names: tuple[str, ...], seed: int, storage: Path, *, listed: bool) -> None:
    """Play scenarios, all of them unless some are named."""
    if listed:
        for name, scenario in SCENARIOS.items():
            click.echo(f"{name:20} {(scenario.__doc__ or '').partition(chr(10))[0]}")
        return
    progress = Progress()
    with ending_well() as interrupt:
        for name in names or SCENARIOS:
            began = time.monotonic()
            with ExitStack() as undo:
                memory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-wb-", dir=SHARED_MEMORY)))
                place = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="zramd-wb-", dir=storage)))
                progress.note(f"writeback: {name}")
                try:
                    said = SCENARIOS[name](Lab(memory, place, interrupt, progress, random.Random(seed)), undo)  # noqa: S311
                except StatusError as error:
                    raise StepError(f"{name}: {error}") from error
            click.echo(f"{name}: {said} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
