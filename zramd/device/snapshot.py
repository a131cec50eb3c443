"""The pages of a device as they are at one moment, read while the device goes on: a snapshot by copy on write.

Pages are read in their order, some under each hold of the lock. Whoever changes a page that was not read yet first
copies aside what is stored for it: see zramd/layout.py for where. The memory for that is populated ahead, so that a
client's request never waits for any; a snapshot for which it does not suffice is given up, and the request goes on.

Of a page that is written back only the place is copied: while there is a snapshot, the backing store is not reclaimed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from zramd.backing import DamagedObjectError
from zramd.device.codecs import CodecError
from zramd.device.entry import COMPRESSED, HUGE, IN_MEMORY, SAME_FILLED, STATE_MASK, WRITTEN_BACK, size_of
from zramd.device.fetching import PageError
from zramd.device.slices import pause
from zramd.layout import (
    COPIED,
    ENTRY_HANDLE_MASK,
    ENTRY_HAS_ELEMENT,
    ENTRY_LASTING_MASK,
    ENTRY_SIZE_SHIFT,
    NOBODY,
    PAGE_SIZE,
    TABLE_CHUNK_SHIFT,
    WORD,
    DeviceRecord,
)
from zramd.memory import NoMemoryError, populate, private_memory

if TYPE_CHECKING:
    from zramd.device.pages import Pages

CHUNK_PAGES = 1 << TABLE_CHUNK_SHIFT
AHEAD_BYTES = 32 << 20
"""Of the store that are populated and not used yet: what clients can overwrite while nobody looks."""
STEP_BYTES = 4 << 20
"""Of the store that are populated together."""
MEMORY_SHARE = 4
"""The store takes at most this part (one in so many) of the memory that is available when the snapshot is taken."""

_FROM, _USED, _READY = DeviceRecord.SNAPSHOT_FROM, DeviceRecord.SNAPSHOT_USED, DeviceRecord.SNAPSHOT_READY


class SnapshotLostError(Exception):
    """The snapshot cannot be read to its end: the text says why."""


@dataclass(slots=True)
class Copies:
    """What pages were before they changed.

    Attributes:
        covered: a byte for each chunk of the page table, 0 if it had no page when the snapshot was taken.
        copied, store: see zramd/layout.py; `store` in bytes.
    """

    covered: bytearray
    copied: memoryview
    store: memoryview

    def preserve(self, device: "Pages", first: int, end: int) -> None:
        """Copy aside what pages that are still to be read are. The caller holds the lock."""
        record, copied = device.record, self.copied
        for index in range(max(first, record[_FROM]), end):
            if not self.covered[index >> TABLE_CHUNK_SHIFT] or copied[index]:
                continue
            entry, checksum, data = _look(device, index)
            position = 0
            if data:
                position, words = record[_USED], 1 + -(-len(data) // WORD)
                if position + words > record[_READY]:
                    record[_FROM] = NOBODY
                    return
                start = position * WORD
                self.store[start : start + WORD] = checksum.to_bytes(WORD, "little")
                self.store[start + WORD : start + WORD + len(data)] = data
                record[_USED] = position + words
            copied[index] = COPIED | entry | position

    def read(self, device: "Pages", first: int, end: int) -> tuple[list[int], bytes]:
        """Return the entries of pages, without handles, and their data; they are no longer to be read.

        A page that is written back keeps its place in the entry, and has no data. The caller holds the lock.

        Raises:
            CodecError: a page's checksum is wrong.
        """
        entries: list[int] = []
        parts: list[bytes | memoryview] = []
        data: bytes | memoryview
        for index in range(first, end):
            word = self.copied[index]
            if word & STATE_MASK == WRITTEN_BACK:
                entry, checksum, data = word & ~COPIED, 0, b""
            elif word:
                entry = word & ENTRY_LASTING_MASK
                start = (word & ENTRY_HANDLE_MASK) * WORD
                checksum = int.from_bytes(self.store[start : start + WORD], "little")
                data = self.store[start + WORD : start + WORD + size_of(entry)]
            else:
                entry, checksum, data = _look(device, index)
            if checksum and xxh3_64_intdigest(data) != checksum:
                raise CodecError(f"page {index} is damaged: its checksum is wrong")
            entries.append(entry)
            parts.append(data)
        device.record[_FROM] = end
        return entries, b"".join(parts)


def _look(device: "Pages", index: int) -> tuple[int, int, bytes | memoryview]:
    """Return the entry of a page as a snapshot has it, the checksum of its data if it has one, and the data."""
    entry = device.entry(index)
    state = entry & STATE_MASK
    lasting = entry & ENTRY_LASTING_MASK
    if state in IN_MEMORY:
        handle = entry & ENTRY_HANDLE_MASK
        return lasting, device.checksum(handle), device.pool.map(handle, size_of(entry))
    if state == SAME_FILLED and entry & ENTRY_HAS_ELEMENT:
        return lasting | WORD << ENTRY_SIZE_SHIFT, 0, device.element(index).to_bytes(WORD, "little")
    if state == WRITTEN_BACK:
        return lasting | entry & ENTRY_HANDLE_MASK, 0, b""
    return lasting, 0, b""


class Snapshot:
    """A device at the moment at which this is made; a context, at whose end the device forgets it."""

    def __init__(self, device: "Pages") -> None:
        """Take the snapshot.

        Raises:
            NoMemoryError: there is no room for it.
            SnapshotLostError: the device is gone.
        """
        self._device = device
        pages = device.disksize // PAGE_SIZE
        self._copies = Copies(
            bytearray(),
            private_memory(pages * WORD).cast("Q"),
            private_memory(max(STEP_BYTES, _available_memory() // MEMORY_SHARE // STEP_BYTES * STEP_BYTES)),
        )
        self._ready = 0
        device.record[_USED] = 1
        self.populate()
        while not self._begin():
            pass

    def _begin(self) -> bool:
        """Begin, unless there are chunks for which there is no memory yet; then get it."""
        device, copies = self._device, self._copies
        with device:
            if device.retired:
                raise SnapshotLostError("the disk was reset")
            covered = device.ready_chunks()
            if covered == copies.covered:
                self.algorithms = device.identity.algorithms.copy()
                self.pages_stored = device.record[DeviceRecord.PAGES_STORED]
                device.begin_snapshot(copies)
                device.record[_READY] = self._ready // WORD
                device.record[_FROM] = 0
                return True
        view = copies.copied.cast("B")
        for chunk, used in enumerate(covered):
            if used and not (copies.covered and copies.covered[chunk]):
                populate(view, chunk * PAGE_SIZE, PAGE_SIZE)
        copies.covered = covered
        return False

    def populate(self) -> None:
        """Populate memory for copies ahead; to be called often, the more is written to the device.

        Raises:
            NoMemoryError: there is none left.
        """
        store, record = self._copies.store, self._device.record
        while self._ready < len(store) and self._ready - record[_USED] * WORD < AHEAD_BYTES:
            populate(store, self._ready, STEP_BYTES)
            self._ready += STEP_BYTES
            with self._device:
                record[_READY] = self._ready // WORD

    def chunks(self) -> Iterator[tuple[int, list[int], bytes]]:
        """Yield (number, entries, data) of each chunk of the page table that had a page. Takes the lock.

        An entry has no handle; for each page the data have as many bytes as its entry says.

        Raises:
            SnapshotLostError: the device is gone, or there was no room for what was overwritten.
            CodecError, PageError: a page is damaged, or cannot be read from the backing store.
            NoMemoryError: the machine has no memory left.
        """
        pages = self._device.disksize // PAGE_SIZE
        covered = self._copies.covered
        chunk = covered.find(1)
        while chunk >= 0:
            first = chunk * CHUNK_PAGES
            end = min(pages, first + CHUNK_PAGES)
            entries: list[int] = []
            data: list[bytes] = []
            step = self._device.snapshot_step
            for start in range(first, end, step):
                found, part = self.read(start, min(end, start + step))
                entries += found
                data.append(part)
                pause()
            yield chunk, entries, b"".join(data)
            self.populate()
            chunk = covered.find(1, chunk + 1)

    def read(self, first: int, end: int) -> tuple[list[int], bytes]:
        """Return the entries and the data of the pages `first` to `end` - 1, which are the next. Takes the lock.

        Raises:
            SnapshotLostError, CodecError, PageError: as `chunks`.
        """
        device = self._device
        with device:
            if device.retired:
                raise SnapshotLostError("the disk was reset or has grown")
            if device.record[_FROM] == NOBODY:
                raise SnapshotLostError(
                    "more was overwritten meanwhile than there is memory to keep a copy of: save when less is written"
                )
            words, view = device.read_snapshot(first, end)
        entries, data = list(words), bytes(view)
        if any(entry & STATE_MASK == WRITTEN_BACK for entry in entries):
            return self._fetch(first, entries, data)
        return entries, data

    def _fetch(self, first: int, entries: list[int], data: bytes) -> tuple[list[int], bytes]:
        """Return entries and data with those of written-back pages, as if they were in memory."""
        backing = self._device.backing
        wanted = (
            (entry & ENTRY_HANDLE_MASK, index, size_of(entry))
            for index, entry in enumerate(entries, first)
            if entry & STATE_MASK == WRITTEN_BACK
        )
        together = backing.read_together(wanted) if backing else {}
        whole: list[int] = []
        parts: list[bytes] = []
        position = 0
        for index, entry in enumerate(entries, first):
            length = size_of(entry)
            if entry & STATE_MASK == WRITTEN_BACK:
                if backing is None:
                    raise PageError(f"page {index} is on the backing store, which is missing")
                try:
                    parts.append(together.get(index) or backing.read(entry & ENTRY_HANDLE_MASK, index, length))
                except OSError as error:
                    raise PageError(f"page {index} cannot be read from the backing store: {error.strerror}") from error
                except DamagedObjectError as error:
                    raise PageError(f"page {index} is damaged on the backing store: {error}") from error
                state = HUGE if length == PAGE_SIZE else COMPRESSED
                whole.append(entry & ENTRY_LASTING_MASK & ~STATE_MASK | state)
            else:
                whole.append(entry)
                parts.append(data[position : position + length])
                position += length
        return whole, b"".join(parts)

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        with self._device:
            self._device.record[_FROM] = NOBODY
            self._device.end_snapshot()


def _available_memory() -> int:
    """Return the bytes that the machine has for new use (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise NoMemoryError("/proc/meminfo does not tell how much memory is available")
