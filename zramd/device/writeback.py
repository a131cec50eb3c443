"""Writeback: pages go from memory to the backing store.

Which pages and what stops it is as in Linux 6.18 (writeback_store and zram_writeback_slots in zram_drv.c), and in which
order too if not all of them may go; else neighbours stay neighbours. But pages stay compressed, and are packed: their
number says little about the blocks that they take.

Pages are copied out of the pool a batch at a time, and are published when the segment that they are in is written:
first the segment, then the entries, each only if nobody touched the page meanwhile, then the objects in memory go.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from zramd.backing import FullError, Store
from zramd.device.cleaning import clean, reclaim
from zramd.device.codecs import CodecError
from zramd.device.entry import HUGE, IN_MEMORY, STATE_MASK, size_of
from zramd.device.fetching import PageError
from zramd.device.recompression import BUCKET_BYTES
from zramd.device.slices import in_slices, pause
from zramd.device.work import Work, WorkKind
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_IDLE,
    ENTRY_INCOMPRESSIBLE,
    ENTRY_TAKEN,
    PAGE_SIZE,
)

MAX_BATCH = 64
"""Pages that are taken or published in a fraction of a millisecond."""


class WritebackType(Enum):
    """What a page has to be."""

    ANY = ""
    IDLE = "idle"
    HUGE = "huge"
    HUGE_IDLE = "huge_idle"
    INCOMPRESSIBLE = "incompressible"

    def matches(self, entry: int) -> bool:
        """Say whether a page with this entry is that, and has an object in memory."""
        if entry & STATE_MASK not in IN_MEMORY:
            return False
        if self is WritebackType.INCOMPRESSIBLE:
            return bool(entry & ENTRY_INCOMPRESSIBLE)
        if self in (WritebackType.HUGE, WritebackType.HUGE_IDLE) and entry & STATE_MASK != HUGE:
            return False
        return self not in (WritebackType.IDLE, WritebackType.HUGE_IDLE) or bool(entry & ENTRY_IDLE)


@dataclass(frozen=True, slots=True)
class Selection:
    """Pages of a type, from `first` to `last`."""

    kind: WritebackType
    first: int
    last: int


class LimitError(Exception):
    """The writeback limit is used up."""


@dataclass(slots=True)
class WritebackOutcome:
    """What came of it so far: pages found, and written back; bytes (of objects) of the latter."""

    candidates: int = 0
    written: int = 0
    bytes_written: int = 0
    cancelled: bool = False


class Writeback:
    """Writes `most` pages back in the calling thread; others may look at `outcome` and `work`, and cancel it."""

    def __init__(
        self,
        device: Device,
        backing: Store,
        selections: list[Selection],
        work: Work | None = None,
        most: int | None = None,
    ) -> None:
        self.outcome = WritebackOutcome()
        self.work = work or Work(WorkKind.WRITEBACK)
        self._device = device
        self._backing = backing
        self._selections = selections
        self._most = most
        # (page, entry when it was taken, place) of what is in the segment, and not yet written.
        self._pending: list[tuple[int, int, int]] = []
        self._failure: OSError | None = None
        self._damaged: PageError | None = None
        self._batch = min(device.writeback.batch_size, MAX_BATCH)
        self._by_size = most is not None or device.writeback.limited

    def run(self) -> WritebackOutcome:
        """Write back what there is.

        Raises:
            LimitError: the limit is used up, and there was more to write.
            FullError: the store is full, and there was more to write.
            OSError: the store could not write some of it; that, and what would have come after it, is still in memory.
            PageError: a page is damaged in memory; the others are written back.
        """
        buckets = [array("Q") for _ in range(PAGE_SIZE // BUCKET_BYTES + 1)]
        for number in range(len(self._selections)):
            in_slices(self._device, self._scan(number, buckets))
        self.outcome.candidates = left = sum(map(len, buckets))
        if self._most is not None:
            left = min(left, self._most)
        self.work.total = left
        reclaim(self._device, self._backing)
        try:
            # The kernel takes the largest first, and of one bucket the page that was found last.
            for bucket in reversed(buckets):
                while bucket and left and not self._is_to_stop:
                    size = min(self._batch, left)
                    batch = bucket[-size:]
                    del bucket[-size:]
                    left -= len(batch)
                    self._write(list(reversed(batch)))
                    self.work.done += len(batch)
                    pause()
        finally:
            self._flush()
        self.outcome.cancelled = self.work.cancelled or self._device.retired
        if self._failure:
            raise self._failure
        if self._damaged:
            raise self._damaged
        return self.outcome

    @property
    def _is_to_stop(self) -> bool:
        return self.work.cancelled or self._device.retired or self._failure is not None

    def _scan(self, number: int, buckets: list["array[int]"]) -> Iterator[None]:
        selection, earlier = self._selections[number], self._selections[:number]
        for first, entries in self._device.chunks(selection.first, selection.last + 1):
            for offset, entry in enumerate(entries):
                if selection.kind.matches(entry) and not _selects(earlier, first + offset, entry):
                    buckets[size_of(entry) // BUCKET_BYTES if self._by_size else 0].append(first + offset)
            if self.work.cancelled:
                return
            yield

    def _write(self, batch: list[int]) -> None:
        taken, stop = self._take(batch)
        for number, (index, entry, data) in enumerate(taken):
            try:
                self._make_room(len(data))
            except FullError:
                self._untake([(index, entry, 0) for index, entry, _ in taken[number:]])
                raise
            self._pending.append((index, entry, self._backing.append(index, data)))
        if stop:
            raise LimitError("the writeback limit is used up")

    def _take(self, batch: list[int]) -> tuple[list[tuple[int, int, bytes]], bool]:
        """Return (page, entry, object) of those that are still candidates, and whether the limit ended that."""
        device = self._device
        taken: list[tuple[int, int, bytes]] = []
        with device:
            if device.retired:
                return taken, False
            for index in batch:
                entry = device.entry(index)
                if not _selects(self._selections, index, entry):
                    continue
                settings = device.writeback
                if settings.limited and not settings.limit:
                    return taken, True
                try:
                    data = device.stored(entry).tobytes()
                except CodecError as error:
                    self._damaged = self._damaged or PageError(f"page {index} is damaged: {error}")
                    continue
                device.charge_writeback(1)
                entry |= ENTRY_TAKEN
                device.replace_entry(index, entry)
                taken.append((index, entry, data))
        return taken, False

    def _untake(self, pages: list[tuple[int, int, int]]) -> None:
        """Leave pages in memory, and give back what they took off the limit."""
        device = self._device
        with device:
            if not device.retired:
                device.charge_writeback(-len(pages))
                for index, entry, _ in pages:
                    if device.entry(index) == entry:
                        device.replace_entry(index, entry & ~ENTRY_TAKEN)

    def _make_room(self, length: int) -> None:
        """Have a segment with room for an object.

        Raises:
            FullError: there is none.
        """
        backing = self._backing
        if backing.has_room(length):
            return
        self._flush()
        backing.end_segment()
        reclaim(self._device, backing)
        if not backing.has_segments:
            clean(self._device, backing)
            reclaim(self._device, backing)
        if not backing.has_room(length):
            backing.begin_segment()

    def _flush(self) -> None:
        """Write what is pending, and publish it."""
        pending, self._pending = self._pending, []
        try:
            self._backing.flush()
        except OSError as error:
            self._failure = error
            for start in range(0, len(pending), self._batch):
                self._untake(pending[start : start + self._batch])
            return
        for start in range(0, len(pending), self._batch):
            self._publish(pending[start : start + self._batch])
            pause()

    def _publish(self, pages: list[tuple[int, int, int]]) -> None:
        device = self._device
        with device:
            for index, entry, place in pages:
                if not device.retired and device.entry(index) == entry:
                    device.write_back(index, place)
                    self.outcome.written += 1
                    self.outcome.bytes_written += size_of(entry)
            self.work.changed, self.work.saved = self.outcome.written, self.outcome.bytes_written


def _selects(selections: list[Selection], index: int, entry: int) -> bool:
    return any(found.first <= index <= found.last and found.kind.matches(entry) for found in selections)
