"""One arena: the zspages of one chain length, and the private state of each.

An arena hands out zspage numbers. Their memory is populated in batches ahead of need and given back to the OS in
batches behind it, so that resident memory follows the pool without a system call for each zspage.
"""

import logging
import os
from array import array
from collections.abc import Iterable, Iterator

from zramd.layout import (
    NOBODY,
    PAGE_SIZE,
    ZSPAGE_BYTES,
    ZSPAGE_CLASS,
    ZSPAGE_FOLLOWING,
    ZSPAGE_FREE,
    ZSPAGE_FRESH,
    ZSPAGE_PRECEDING,
    ZSPAGE_USED,
    ArenaRecord,
)
from zramd.memory import NoMemoryError, Region, RegionError, populate, private_memory, record

GROW_PAGES = 64
"""Pages populated at once: about 25 microseconds of the kernel's time."""
RESERVE_PAGES = 512
"""Free pages kept resident at most in each arena; when more are free, half of this stays."""

RECORDS_CHUNK = 4 * PAGE_SIZE
"""Bytes of zspage records populated at once."""

_POPULATED, _RESERVE, _LOW, _WAKE = map(int, ArenaRecord)

log = logging.getLogger(__name__)


class Arena:
    """The zspages of `pages` pages each.

    `used`, `free`, `fresh`, `size_class`, `following` and `preceding` are the columns of the zspage records;
    `populated` is the stack of free zspages with memory, and `record` its height (see zramd/layout.py).
    """

    def __init__(self, region: Region, pages: int) -> None:
        self.region = region
        self.pages = pages
        self.capacity = region.size // (pages * PAGE_SIZE)
        self.zspages = private_memory(self.capacity * ZSPAGE_BYTES)
        halves, quarters = self.zspages.cast("H"), self.zspages.cast("I")
        self.used, self.free, self.fresh = (
            halves[column :: ZSPAGE_BYTES // 2] for column in (ZSPAGE_USED, ZSPAGE_FREE, ZSPAGE_FRESH)
        )
        self.size_class = self.zspages[ZSPAGE_CLASS::ZSPAGE_BYTES]
        self.following, self.preceding = (
            quarters[column :: ZSPAGE_BYTES // 4] for column in (ZSPAGE_FOLLOWING, ZSPAGE_PRECEDING)
        )
        self.populated = private_memory(self.capacity * 4).cast("I")
        self.record = record(len(ArenaRecord))
        self.record[_RESERVE] = RESERVE_PAGES // pages
        self.record[_LOW] = NOBODY
        self._punched = array("I")  # free zspages without memory: a stack
        self._prepared = 0
        self._records_ready = 0  # bytes

    def __len__(self) -> int:
        """Return how many zspage numbers were ever handed out or prepared."""
        return self._prepared

    def take(self) -> int:
        """Return a zspage with memory, its contents undefined.

        Raises:
            NoMemoryError: there is no room, in the arena or in the machine.
        """
        record = self.record
        if not record[_POPULATED]:
            self.grow()
        record[_POPULATED] -= 1
        if record[_POPULATED] == record[_LOW]:
            os.eventfd_write(record[_WAKE], 1)
        return self.populated[record[_POPULATED]]

    def give(self, zspage: int) -> None:
        """Take back a zspage that holds no objects."""
        record = self.record
        self.size_class[zspage] = 0
        self.populated[record[_POPULATED]] = zspage
        record[_POPULATED] += 1
        if record[_POPULATED] > record[_RESERVE]:
            self.shrink()

    def grow(self) -> None:
        """Populate some zspages.

        Raises:
            NoMemoryError: there is no room for one.
        """
        try:
            self._grow_by(max(1, GROW_PAGES // self.pages))
        except NoMemoryError:
            # There may still be room for the one that is needed.
            self._grow_by(1)

    def _grow_by(self, count: int) -> None:
        zspages = self.claim(count)
        try:
            self.populate(zspages)
        except NoMemoryError:
            self.disclaim(zspages)
            raise
        self.add(zspages)

    def claim(self, count: int) -> "array[int]":
        """Return up to `count` zspages without memory, ascending; they are the caller's to populate.

        Raises:
            NoMemoryError: there are none.
        """
        if self._punched:
            zspages = array("I", sorted(self._punched[-count:]))
            del self._punched[-count:]
            return zspages
        first = self._prepared
        zspages = array("I", range(first, min(first + count, self.capacity)))
        if not zspages:
            raise NoMemoryError(f"no zspage of {self.pages} pages is left: its address range is used up")
        self._prepared += len(zspages)
        return zspages

    def populate(self, zspages: "array[int]") -> None:
        """Give claimed zspages memory. Needs no lock.

        Raises:
            NoMemoryError: there is no room for all of them; none has any.
        """
        span = self.pages * PAGE_SIZE
        done = 0
        try:
            self._populate_records((zspages[-1] + 1) * ZSPAGE_BYTES)
            for start, end in _runs(zspages):
                self.region.populate(start * span, (end - start) * span)
                done += end - start
        except NoMemoryError:
            for start, end in _runs(zspages[:done]):
                self.region.punch(start * span, (end - start) * span)
            raise

    def _populate_records(self, end: int) -> None:
        while self._records_ready < end:
            length = min(RECORDS_CHUNK, len(self.zspages) - self._records_ready)
            populate(self.zspages, self._records_ready, length)
            self._records_ready += length

    def disclaim(self, zspages: "array[int]") -> None:
        """Give up claimed zspages, which have no memory; the lowest will be claimed first."""
        self._punched.extend(reversed(zspages))

    def add(self, zspages: "array[int]") -> None:
        """Add populated zspages (ascending) to the free ones; the lowest is taken first."""
        zspages.reverse()
        self._push(zspages)

    def _push(self, zspages: "array[int]") -> None:
        height = self.record[_POPULATED]
        self.populated[height : height + len(zspages)] = zspages
        self.record[_POPULATED] += len(zspages)

    def shrink(self) -> None:
        """Punch the free zspages that were given back longest ago.

        In order of address, so that neighbours go together.
        """
        height = self.record[_POPULATED]
        count = height - self.record[_RESERVE] // 2
        zspages = array("I", sorted(self.populated[:count]))
        self.populated[: height - count] = array("I", self.populated[count:height])
        self.record[_POPULATED] -= count
        self._punch(zspages)

    def _punch(self, zspages: "array[int]") -> None:
        """Give free zspages (ascending) back to the OS. Where that fails they stay populated, and are used again."""
        span = self.pages * PAGE_SIZE
        done = 0
        try:
            for start, end in _runs(zspages):
                self.region.punch(start * span, (end - start) * span)
                done += end - start
        except RegionError as error:
            log.warning("memory stays allocated: %s", error)
            self.record[_RESERVE] = self.capacity
        self._punched.extend(zspages[:done])
        self._push(zspages[done:])

    def restore(self, count: int) -> None:
        """Note that `count` zspages were found in the region, all of them free so far."""
        self._prepared = count
        self._populate_records(count * ZSPAGE_BYTES)

    def release_unused(self) -> None:
        """After recovery: punch what no object was found in."""
        self._punch(array("I", (zspage for zspage in range(self._prepared) if not self.used[zspage])))


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of consecutive numbers in an ascending sequence."""
    first = end = -1
    for number in numbers:
        if number != end:
            if end > first:
                yield first, end
            first = number
        end = number + 1
    if end > first:
        yield first, end
