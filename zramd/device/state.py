"""What a device has and counts: its regions, the page table, the counters; and how they are found again."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from zramd.backing import Store
from zramd.device.algorithms import codec_number
from zramd.device.codecs import Decompress
from zramd.device.counters import (
    DEFAULT_BATCH_SIZE,
    BdStat,
    IoStat,
    MmStat,
    RequestStat,
    WritebackSettings,
)
from zramd.device.entry import COMPRESSED, HUGE, SAME_FILLED, STATE_MASK, WRITTEN_BACK
from zramd.device.snapshot import Copies
from zramd.device.states import Run, state_runs
from zramd.device.superblock import Identity, StateError
from zramd.layout import (
    ACCESSED_CHUNK_SHIFT,
    ENTRY_HANDLE_MASK,
    ENTRY_HAS_ELEMENT,
    ENTRY_RESERVED_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_TAKEN,
    NOBODY,
    PAGE_SHIFT,
    PAGE_SIZE,
    TABLE_CHUNK_SHIFT,
    DeviceRecord,
    Superblock,
)
from zramd.memory import Region, SparseTable, record
from zramd.zsmalloc import MAX_LOST, DamagedError, Pool, recover
from zramd.zsmalloc.stats import ClassStat, class_stats

_PAGES_STORED, _COMPR_DATA_SIZE, _SAME_PAGES, _HUGE_PAGES, _NOTED_PAGES, *_ = map(int, DeviceRecord)
_SNAPSHOT_FROM = int(DeviceRecord.SNAPSHOT_FROM)
_GENERATION, _CODEC_PAGES = int(DeviceRecord.GENERATION), int(DeviceRecord.CODEC_PAGES)
_BACKED_PAGES = int(DeviceRecord.BACKED_PAGES)
_READS, _WRITE_SECTORS = int(Superblock.READS), int(Superblock.WRITE_SECTORS)
_NEVER_SET = ENTRY_RESERVED_MASK


def uptime() -> int:
    """Return the seconds since the machine started, suspended or not."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


@dataclass(frozen=True, slots=True)
class Tables:
    """What a device has for each page: see zramd/layout.py. `accessed` has half a word for each."""

    entries: SparseTable
    elements: SparseTable
    accessed: SparseTable


class DeviceState:
    """The state of one zram device, on its regions.

    `identity` says what it is. `lock` guards what says "the caller holds the lock"; `with device:` holds it for a
    batch. Lifetime counters stand in the superblock, the others in `record` (see zramd/layout.py). `backing` is where
    pages are written back to; without it, those that are cannot be read.
    """

    def __init__(self, identity: Identity, superblock: Region, tables: Tables, pool: Pool) -> None:
        self.identity = identity
        self.disksize = identity.disksize
        self.lock = threading.Lock()
        self.retired = False  # the regions are gone
        self.pool = pool
        self.backing: Store | None = None
        self.record = record(DeviceRecord.END)
        self.record[_SNAPSHOT_FROM] = NOBODY
        self._copies: Copies | None = None
        self._words = superblock.words
        self._table = tables.entries
        self._elements = tables.elements
        self._accessed = tables.accessed
        self._times = tables.accessed.region.halves
        self._decompressors: list[Decompress | None] = []
        self.note_codecs()
        self._huge_limit = pool.geometry.huge_limit
        self._checksums = pool.checksum_region.words if pool.checksum_region else None

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def note_codecs(self) -> None:
        """Take notice of codecs that have changed. The caller holds the lock, or nobody else knows the device yet."""
        codecs = self.identity.algorithms.codecs
        self._decompressors = [chosen.decompressor() if chosen else None for chosen in codecs]
        self.record[_GENERATION] += 1

    @property
    def generation(self) -> int:
        """How often a codec was changed."""
        return self.record[_GENERATION]

    def codec_pages(self, number: int) -> int:
        """Return how many compressed pages have the codec of a number."""
        return self.record[DeviceRecord.CODEC_PAGES + number]

    def pages_by_algorithm(self) -> dict[str, int]:
        """Return how many compressed pages each algorithm has. Takes the lock."""
        pages: dict[str, int] = {}
        with self.lock:
            for number, chosen in enumerate(self.identity.algorithms.codecs):
                if chosen is not None:
                    pages[chosen.name] = pages.get(chosen.name, 0) + self.codec_pages(number)
        return pages

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, list[int]]]:
        """Yield (first page, entries) of each chunk of the page table that is in use, from page `first` to `end` - 1.

        The caller holds the lock.
        """
        pages = self.disksize >> PAGE_SHIFT if end is None else end
        chunk = (first >> TABLE_CHUNK_SHIFT) - 1
        while (chunk := self._table.ready.find(1, chunk + 1)) >= 0 and chunk << TABLE_CHUNK_SHIFT < pages:
            low = max(first, chunk << TABLE_CHUNK_SHIFT)
            yield low, self._table.words[low : min(pages, chunk + 1 << TABLE_CHUNK_SHIFT)].tolist()

    def entries(self) -> Iterator[tuple[int, int]]:
        """Yield (page, entry) of each page that is not empty. The caller holds the lock."""
        for first, entries in self.chunks():
            yield from ((index, entry) for index, entry in enumerate(entries, first) if entry)

    def entry(self, index: int) -> int:
        """Return the entry of a page. The caller holds the lock."""
        return self._table.words[index] if self._table.ready[index >> TABLE_CHUNK_SHIFT] else 0

    def replace_entry(self, index: int, entry: int) -> None:
        """Change flags in the entry of a page, which is not empty. The caller holds the lock."""
        self._table.words[index] = entry

    def element(self, index: int) -> int:
        """Return the pattern of a same-filled page that has one. The caller holds the lock."""
        return self._elements.words[index]

    def checksum(self, handle: int) -> int:
        """Return what was noted as the checksum of an object, 0 without checksums. The caller holds the lock."""
        return 0 if self._checksums is None else self._checksums[handle]

    def ready_chunks(self) -> bytearray:
        """Return a byte for each chunk of the page table, 0 if it has no page. The caller holds the lock."""
        return bytearray(self._table.ready)

    def copy_chunk(self, chunk: int) -> bytes:
        """Return the entries of a chunk of the page table that is in use, 8 bytes each. The caller holds the lock."""
        return self._table.words[chunk << TABLE_CHUNK_SHIFT : chunk + 1 << TABLE_CHUNK_SHIFT].tobytes()

    def states(self, first: int, end: int) -> list[Run]:
        """Return what the pages from `first` to `end` - 1 are, or the first of them: see `state_runs`."""
        return list(state_runs(self._table, first, end))

    def access_times(self, first: int, count: int) -> list[int]:
        """Return when pages of a chunk were last read or written, 0 if that is not known. The caller holds the lock."""
        if not self._accessed.ready[first >> ACCESSED_CHUNK_SHIFT]:
            return [0] * count
        return self._times[first : first + count].tolist()

    def note_access(self, index: int) -> None:
        """Note that a page is read now. The caller holds the lock."""
        if self._accessed.ready[index >> ACCESSED_CHUNK_SHIFT]:
            self._times[index] = uptime()

    def note_failed_fetch(self) -> None:
        """Count a page that the backing store did not return. The caller holds the lock."""
        self._words[Superblock.FAILED_BACKING_READS] += 1

    def class_index(self, length: int) -> int:
        """Return the index of the size class that the kernel looks up for an object of so many bytes.

        Without the header, as zs_lookup_class_index does.
        """
        return self.pool.geometry.lookup(length)

    def set_mem_limit(self, limit: int) -> None:
        """Set the memory limit to `limit` bytes, rounded up to pages; 0 is none. Takes the lock."""
        with self.lock:
            self._words[Superblock.MEM_LIMIT] = -(-limit // PAGE_SIZE)
            self.record[_NOTED_PAGES] = 0

    def reset_mem_used_max(self) -> None:
        """Set the high-water mark to what is used now. Takes the lock."""
        with self.lock:
            self._words[Superblock.MEM_USED_MAX] = self.pool.pages
            self.record[_NOTED_PAGES] = 0

    @property
    def writeback(self) -> WritebackSettings:
        """What writeback may do."""
        words = self._words
        return WritebackSettings(
            words[Superblock.WRITEBACK_LIMIT],
            bool(words[Superblock.WRITEBACK_LIMIT_ENABLE]),
            words[Superblock.WRITEBACK_BATCH_SIZE] or DEFAULT_BATCH_SIZE,
        )

    @writeback.setter
    def writeback(self, settings: WritebackSettings) -> None:
        """Change it. The caller holds the lock."""
        self._words[Superblock.WRITEBACK_LIMIT] = settings.limit
        self._words[Superblock.WRITEBACK_LIMIT_ENABLE] = settings.limited
        self._words[Superblock.WRITEBACK_BATCH_SIZE] = settings.batch_size

    def charge_writeback(self, pages: int) -> None:
        """Take pages off the limit, or give them back. The caller holds the lock."""
        if self._words[Superblock.WRITEBACK_LIMIT_ENABLE]:
            self._words[Superblock.WRITEBACK_LIMIT] -= pages

    def mm_stat(self) -> MmStat:
        """Return the memory counters of one moment. Takes the lock."""
        with self.lock:
            words, record = self._words, self.record
            return MmStat(
                orig_data_size=record[_PAGES_STORED] * PAGE_SIZE,
                compr_data_size=record[_COMPR_DATA_SIZE],
                mem_used_total=self.pool.pages * PAGE_SIZE,
                mem_limit=words[Superblock.MEM_LIMIT] * PAGE_SIZE,
                mem_used_max=words[Superblock.MEM_USED_MAX] * PAGE_SIZE,
                same_pages=record[_SAME_PAGES],
                pages_compacted=words[Superblock.PAGES_COMPACTED],
                huge_pages=record[_HUGE_PAGES],
                huge_pages_since=words[Superblock.HUGE_PAGES_SINCE],
            )

    def io_stat(self) -> IoStat:
        """Return the failure and discard counters. Takes the lock."""
        with self.lock:
            words = self._words
            failed = words[Superblock.FAILED_READS], words[Superblock.FAILED_WRITES]
            return IoStat(
                *failed,
                notify_free=words[Superblock.NOTIFY_FREE],
                failed_backing_reads=words[Superblock.FAILED_BACKING_READS],
            )

    def bd_stat(self) -> BdStat:
        """Return the counters of the backing store. Takes the lock."""
        with self.lock:
            words = self._words
            count = -(-self.backing.live_bytes // PAGE_SIZE) if self.backing else 0
            done = words[Superblock.BACKING_READS], words[Superblock.BACKING_WRITES]
            return BdStat(count, *done, self.record[_BACKED_PAGES])

    def request_stat(self) -> RequestStat:
        """Return the request counters. Takes the lock."""
        with self.lock:
            return RequestStat(*self._words[_READS : _WRITE_SECTORS + 1])

    def class_stats(self) -> list[ClassStat]:
        """Return the pool's size classes at one moment. Takes the lock."""
        with self.lock:
            return class_stats(self.pool)

    def retire(self) -> None:
        """Let go of the regions; the counters stay what they are. The caller holds the lock."""
        self.retired = True
        self._words = memoryview(bytearray(self._words)).cast("Q")

    def recover(self) -> None:
        """Rebuild the private state from the regions.

        Raises:
            StateError: the regions contradict themselves.
        """
        # A reset that was cut short leaves no page table, and everything else.
        most_lost = MAX_LOST if any(self._table.ready) else self.disksize
        try:
            recover(self.pool, self._scan(), most_lost)
        except DamagedError as error:
            raise StateError(f"the regions are damaged: {error}") from error
        # The last write may have been cut short before it was noted.
        self._words[Superblock.MEM_USED_MAX] = max(self._words[Superblock.MEM_USED_MAX], self.pool.pages)

    def _scan(self) -> Iterator[tuple[int, int]]:
        """Check and count every entry, and yield (handle, length) of those that hold an object."""
        for index, entry in self.entries():
            state = entry & STATE_MASK
            length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
            if entry & _NEVER_SET:
                raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
            if entry & ENTRY_TAKEN:
                self._table.words[index] = entry & ~ENTRY_TAKEN
            self.record[_PAGES_STORED] += 1
            if state == SAME_FILLED:
                if length or not self._has_pattern(index, entry & ENTRY_HANDLE_MASK):
                    raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
                self.record[_SAME_PAGES] += 1
                continue
            if state == WRITTEN_BACK:
                self.record[_BACKED_PAGES] += 1
            if state in (HUGE, WRITTEN_BACK) and length == PAGE_SIZE:
                self.record[_HUGE_PAGES] += state == HUGE
            elif (
                state not in (COMPRESSED, WRITTEN_BACK)
                # Recompression may leave an object that has a whole page for lack of room for its header (Linux 6.18).
                or not 0 < length < PAGE_SIZE
                or self.identity.algorithms.codecs[codec_number(entry)] is None
            ):
                raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
            else:
                self.record[_CODEC_PAGES + codec_number(entry)] += 1
            if state == WRITTEN_BACK:
                continue
            self.record[_COMPR_DATA_SIZE] += length
            yield entry & ENTRY_HANDLE_MASK, length

    def _has_pattern(self, index: int, handle: int) -> bool:
        """Say whether what the entry of a same-filled page has for a handle is right."""
        if handle != ENTRY_HAS_ELEMENT:
            return handle == 0
        return self._elements.ready[index >> TABLE_CHUNK_SHIFT] != 0 and self._elements.words[index] != 0
