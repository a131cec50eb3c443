"""The zram device: pages in, compressed objects in the pool, pages out.

The device is a monitor: whoever calls a method that says so holds `lock`, for a whole batch of requests at a time.
Compression is the one expensive step that needs no lock; a `Stream` does it before the lock is taken.
"""

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from xxhash import xxh3_64_intdigest

from zramd.backing import Store
from zramd.device.algorithms import codec_number
from zramd.device.codecs import Codec, CodecError, Decompress
from zramd.device.counters import (
    DEFAULT_BATCH_SIZE,
    BdStat,
    IoStat,
    MmStat,
    RequestStat,
    WritebackSettings,
)
from zramd.device.fetching import NOTHING_FETCHED, Fetched, NotInMemoryError, PageError, fetch, fetch_page
from zramd.device.slices import in_slices
from zramd.device.snapshot import Copies
from zramd.device.states import Run, state_runs
from zramd.device.stream import Prepared, Stream, whole_pages
from zramd.device.superblock import Identity, StateError
from zramd.device.work import Work, WorkKind
from zramd.layout import (
    ACCESSED_CHUNK_SHIFT,
    ENTRY_HANDLE_MASK,
    ENTRY_HAS_ELEMENT,
    ENTRY_IDLE,
    ENTRY_RESERVED_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    ENTRY_TAKEN,
    NOBODY,
    PAGE_SHIFT,
    PAGE_SIZE,
    TABLE_CHUNK_SHIFT,
    WORD,
    DeviceRecord,
    PageState,
    PoolRecord,
    Superblock,
)
from zramd.memory import NoMemoryError, Region, SparseTable, record
from zramd.zsmalloc import MAX_LOST, DamagedError, Pool, compact, recover
from zramd.zsmalloc.stats import ClassStat, class_stats

_PAGE_MASK = PAGE_SIZE - 1
_WORDS = PAGE_SIZE // WORD
ZERO_PAGE = bytes(PAGE_SIZE)
"""What `read` returns for a page of zeros: this very object, or a view of it."""

# The states as they stand in an entry, as plain integers: an enum costs more than the rest of the comparison.
_STATE_MASK = ENTRY_STATE_MASK << ENTRY_STATE_SHIFT
_SAME_FILLED = PageState.SAME_FILLED << ENTRY_STATE_SHIFT
_COMPRESSED = PageState.COMPRESSED << ENTRY_STATE_SHIFT
_HUGE_STATE = PageState.HUGE << ENTRY_STATE_SHIFT
_WRITTEN_BACK = PageState.WRITTEN_BACK << ENTRY_STATE_SHIFT
_UNTOUCHED = ENTRY_IDLE | ENTRY_TAKEN
_HUGE = _HUGE_STATE | PAGE_SIZE << ENTRY_SIZE_SHIFT
_POOL_PAGES = int(PoolRecord.PAGES)
_PAGES_STORED, _COMPR_DATA_SIZE, _SAME_PAGES, _HUGE_PAGES, _NOTED_PAGES, *_ = map(int, DeviceRecord)
_SNAPSHOT_FROM = int(DeviceRecord.SNAPSHOT_FROM)
_GENERATION, _CODEC_PAGES = int(DeviceRecord.GENERATION), int(DeviceRecord.CODEC_PAGES)
_BACKED_PAGES = int(DeviceRecord.BACKED_PAGES)
_READS, _READ_SECTORS = int(Superblock.READS), int(Superblock.READ_SECTORS)
_WRITES, _WRITE_SECTORS = int(Superblock.WRITES), int(Superblock.WRITE_SECTORS)
_NEVER_SET = ENTRY_RESERVED_MASK


def uptime() -> int:
    """Return the seconds since the machine started, suspended or not."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


class NoSpaceError(Exception):
    """A page cannot be stored: the memory limit is reached or the machine has no memory left."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a device has for each page: see zramd/layout.py. `accessed` has half a word for each."""

    entries: SparseTable
    elements: SparseTable
    accessed: SparseTable


class Device:
    """One zram device on its regions.

    `identity` says what it is. `lock` guards what says "the caller holds the lock"; `with device:` holds it for a
    batch. Lifetime counters stand in the superblock, the others in `record` (see zramd/layout.py). `backing` is where
    pages are written back to; without it, those that are cannot be read.
    """

    snapshot_step = 128
    """Pages of a snapshot that are read under one hold of the lock."""

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

    @cached_property
    def _scratch(self) -> Stream:
        return self.stream(bytearray(PAGE_SIZE))

    def stream(self, buffer: bytearray) -> Stream:
        """Return a stream for a thread that receives into `buffer`."""
        return Stream(buffer, self._huge_limit, self.identity.algorithms, self.record[_GENERATION])

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

    def attach(self, backing: Store | None) -> None:
        """Have a backing store from now on. Takes the lock.

        Raises:
            DamagedObjectError: pages that are written back cannot be there.
        """
        if backing and self.record[_BACKED_PAGES]:
            for _, entry in self.entries():
                if entry & _STATE_MASK == _WRITTEN_BACK:
                    backing.adopt(entry & ENTRY_HANDLE_MASK, entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK)
        with self.lock:
            self.backing = backing

    def fetch(self, pages: list[int]) -> dict[int, Fetched]:
        """Read pages from wherever they are. The caller does not hold the lock."""
        return fetch(self, pages)

    def fetch_pages(self, first: int, count: int) -> list[bytes | None]:
        """Read `count` pages from wherever they are, None for one that cannot be. The caller does not hold the lock."""
        return [fetch_page(self, index).page for index in range(first, first + count)]

    def load_page(self, index: int) -> bytes:
        """Return a page that is in memory. The caller holds the lock.

        Raises:
            PageError: it is damaged.
        """
        out: list[bytes | memoryview] = []
        self._load(index, index + 1, out, NOTHING_FETCHED)
        return bytes(out[0])

    def note_access(self, index: int) -> None:
        """Note that a page is read now. The caller holds the lock."""
        if self._accessed.ready[index >> ACCESSED_CHUNK_SHIFT]:
            self._times[index] = uptime()

    def note_failed_fetch(self) -> None:
        """Count a page that the backing store did not return. The caller holds the lock."""
        self._words[Superblock.FAILED_BACKING_READS] += 1

    def read(
        self, offset: int, length: int, out: list[bytes | memoryview], fetched: dict[int, Fetched] = NOTHING_FETCHED
    ) -> None:
        """Append `length` bytes from `offset` to `out`, as buffers that stay valid. The caller holds the lock.

        Raises:
            PageError: a page is damaged; `out` is as it was.
            NotInMemoryError: pages have to be fetched first, as if nothing had been asked.
        """
        self._words[_READS] += 1
        self._words[_READ_SECTORS] += length >> 9
        first = offset >> PAGE_SHIFT
        end = offset + length
        try:
            if not (offset | length) & _PAGE_MASK:
                self._load(first, end >> PAGE_SHIFT, out, fetched)
                return
            pages: list[bytes | memoryview] = []
            self._load(first, (end + _PAGE_MASK) >> PAGE_SHIFT, pages, fetched)
        except PageError:
            self._words[Superblock.FAILED_READS] += 1
            raise
        except NotInMemoryError:
            self._words[_READS] -= 1
            self._words[_READ_SECTORS] -= length >> 9
            raise
        if end & _PAGE_MASK:
            pages[-1] = memoryview(pages[-1])[: end & _PAGE_MASK]
        if offset & _PAGE_MASK:
            pages[0] = memoryview(pages[0])[offset & _PAGE_MASK :]
        out += pages

    def _load(self, first: int, end: int, out: list[bytes | memoryview], fetched: dict[int, Fetched]) -> None:
        """Append the pages `first` to `end` - 1 to `out`."""
        before = len(out)
        backed = self._load_pages(first, end, out)
        missing = []
        for index in backed:
            known = fetched.get(index)
            if known is None or not known.is_still(self, index):
                missing.append(index)
            elif known.page is None:
                del out[before:]
                raise PageError(f"page {index} {known.failure}")
            else:
                out[before + index - first] = known.page
        if missing:
            del out[before:]
            raise NotInMemoryError(missing)

    def _load_pages(self, first: int, end: int, out: list[bytes | memoryview]) -> list[int]:
        """Append pages to `out`; return which of them are only in the backing store."""
        backed: list[int] = []
        ready, table = self._table.ready, self._table.words
        timed, times, now = self._accessed.ready, self._times, uptime()
        before = len(out)
        for index in range(first, end):
            entry = table[index] if ready[index >> TABLE_CHUNK_SHIFT] else 0
            state = entry & _STATE_MASK
            if entry and timed[index >> ACCESSED_CHUNK_SHIFT]:
                times[index] = now
            if entry & _UNTOUCHED:
                table[index] = entry & ~_UNTOUCHED
            if state in (_COMPRESSED, _HUGE_STATE):
                try:
                    data = self.stored(entry)
                    out.append(self.decompress(entry, data) if state == _COMPRESSED else data.tobytes())
                except CodecError as error:
                    del out[before:]
                    raise PageError(f"page {index} is damaged: {error}") from error
            elif state == _SAME_FILLED and entry & ENTRY_HAS_ELEMENT:
                out.append(self._elements.words[index].to_bytes(WORD, "little") * _WORDS)
            else:
                if state == _WRITTEN_BACK:
                    backed.append(index)
                out.append(ZERO_PAGE)
        return backed

    def stored(self, entry: int) -> memoryview:
        """Return a view of the object of an entry. The caller holds the lock.

        Raises:
            CodecError: it is not what was stored.
        """
        handle = entry & ENTRY_HANDLE_MASK
        data = self.pool.map(handle, entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK)
        if self._checksums is not None and self._checksums[handle] != xxh3_64_intdigest(data):
            raise CodecError("its checksum is wrong")
        return data

    def decompress(self, entry: int, data: memoryview) -> bytes:
        """Return the page of an entry with these data. The caller holds the lock.

        Raises:
            CodecError: the data are damaged.
        """
        decompress = self._decompressors[codec_number(entry)]
        if decompress is None:
            raise CodecError("there is no such codec")
        return decompress(data)

    def write(
        self,
        stream: Stream,
        start: int,
        length: int,
        offset: int,
        prepared: list[Prepared],
        fetched: dict[int, Fetched] = NOTHING_FETCHED,
    ) -> None:
        """Write `length` bytes, at `start` in the stream's buffer, to `offset`. The caller holds the lock.

        `prepared` is what the stream made of the whole pages in them; pages covered in part are read, modified and
        compressed here.

        Raises:
            NoSpaceError: no room for a page: it keeps its old contents, those before it are written, the rest is not.
            PageError: a page covered in part is damaged.
            NotInMemoryError: pages covered in part have to be fetched first, as if nothing had been asked.
        """
        if (offset | length) & _PAGE_MASK:
            self._require_fetched(offset, length, fetched)
        self._words[_WRITES] += 1
        self._words[_WRITE_SECTORS] += length >> 9
        if stream.generation != self.record[_GENERATION]:
            stream.choose(self.identity.algorithms, self.record[_GENERATION])
            prepared = stream.prepare(start, length, offset)
        try:
            if not (offset | length) & _PAGE_MASK:
                self._store(offset >> PAGE_SHIFT, prepared, stream.bits)
            else:
                self._write_unaligned(offset, stream.view[start : start + length], prepared, stream.bits, fetched)
        except NoMemoryError as error:
            self._words[Superblock.FAILED_WRITES] += 1
            raise NoSpaceError(str(error)) from error
        except (NoSpaceError, PageError):
            self._words[Superblock.FAILED_WRITES] += 1
            raise

    def _require_fetched(self, offset: int, length: int, fetched: dict[int, Fetched]) -> None:
        """Raise NotInMemoryError if a request covers in part what is only in the backing store."""
        head, whole_end = whole_pages(offset, length)
        pages = [offset >> PAGE_SHIFT] * bool(head) + [offset + whole_end >> PAGE_SHIFT] * (whole_end < length)
        missing = [
            index
            for index in pages
            if self.entry(index) & _STATE_MASK == _WRITTEN_BACK
            and not (index in fetched and fetched[index].is_still(self, index))
        ]
        if missing:
            raise NotInMemoryError(missing)

    def _write_unaligned(
        self, offset: int, data: memoryview, prepared: list[Prepared], bits: int, fetched: dict[int, Fetched]
    ) -> None:
        head, whole_end = whole_pages(offset, len(data))
        if head:
            self._modify(offset, data[:head], fetched)
        self._store((offset + head) >> PAGE_SHIFT, prepared, bits)
        if whole_end < len(data):
            self._modify(offset + whole_end, data[whole_end:], fetched)

    def _modify(self, offset: int, data: memoryview, fetched: dict[int, Fetched]) -> None:
        """Write less than a page, inside one page."""
        index, start = divmod(offset, PAGE_SIZE)
        old: list[bytes | memoryview] = []
        self._load(index, index + 1, old, fetched)
        scratch = self._scratch
        if scratch.generation != self.record[_GENERATION]:
            scratch.choose(self.identity.algorithms, self.record[_GENERATION])
        page = scratch.view
        page[:] = old[0]
        page[start : start + len(data)] = data
        self._store(index, scratch.prepare(0, PAGE_SIZE, 0), scratch.bits)

    def _store(self, index: int, prepared: list[Prepared], bits: int) -> None:
        """Store pages from `index` on: new object first, then the entry, then the old object goes.

        `bits` tell their codec.
        """
        last = index + len(prepared) - 1
        for chunk in range(index >> ACCESSED_CHUNK_SHIFT, (last >> ACCESSED_CHUNK_SHIFT) + 1):
            if not self._accessed.ready[chunk]:
                self._accessed.make_ready(chunk)
        self._times[index : last + 1] = array("I", [uptime()]) * len(prepared)
        if last >= self.record[_SNAPSHOT_FROM]:
            self.preserve(index, last + 1)
        chunk, last = index >> TABLE_CHUNK_SHIFT, index + len(prepared) - 1 >> TABLE_CHUNK_SHIFT
        if chunk != last or not self._table.ready[chunk]:
            self._table.make_ready(chunk, last)
        table, pool, record, pool_record = self._table.words, self.pool, self.record, self.pool.record
        pages_of_codec = _CODEC_PAGES + codec_number(bits)
        for page in prepared:
            if isinstance(page, int):
                if page:
                    if not self._elements.ready[index >> TABLE_CHUNK_SHIFT]:
                        self._elements.make_ready(index >> TABLE_CHUNK_SHIFT)
                    self._elements.words[index] = page
                    entry = _SAME_FILLED | ENTRY_HAS_ELEMENT
                else:
                    entry = _SAME_FILLED
                record[_SAME_PAGES] += 1
            else:
                length = len(page)
                handle = pool.malloc(length, page)
                if self._checksums is not None:
                    self._checksums[handle] = xxh3_64_intdigest(page)
                if pool_record[_POOL_PAGES] > record[_NOTED_PAGES]:
                    self._note_use(handle)
                if length == PAGE_SIZE:
                    entry = _HUGE | handle
                    record[_HUGE_PAGES] += 1
                    self._words[Superblock.HUGE_PAGES_SINCE] += 1
                else:
                    entry = _COMPRESSED | length << ENTRY_SIZE_SHIFT | handle | bits
                    record[pages_of_codec] += 1
                record[_COMPR_DATA_SIZE] += length
            old = table[index]
            table[index] = entry
            if not old:
                record[_PAGES_STORED] += 1
            elif old & _STATE_MASK == _COMPRESSED:
                pool.free(old & ENTRY_HANDLE_MASK)
                record[_COMPR_DATA_SIZE] -= old >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
                record[_CODEC_PAGES + codec_number(old)] -= 1
            else:
                self._release(old)
            index += 1

    def _note_use(self, handle: int) -> None:
        """Raise the high-water mark to what the pool uses now, and then refuse `handle` if that is over the limit."""
        words, used = self._words, self.pool.pages
        limit = words[Superblock.MEM_LIMIT]
        highest = words[Superblock.MEM_USED_MAX] = max(words[Superblock.MEM_USED_MAX], used)
        self.record[_NOTED_PAGES] = min(highest, limit) if limit else highest
        if limit and used > limit:
            self.pool.free(handle)
            raise NoSpaceError(f"the memory limit of {limit * PAGE_SIZE} bytes is reached")

    def _release(self, entry: int) -> None:
        """Free what an entry that is no longer in the table refers to."""
        state = entry & _STATE_MASK
        if state == _SAME_FILLED:
            self.record[_SAME_PAGES] -= 1
            return
        length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
        if state == _WRITTEN_BACK:
            self.record[_BACKED_PAGES] -= 1
            if length < PAGE_SIZE:
                self.record[_CODEC_PAGES + codec_number(entry)] -= 1
            if self.backing:
                self.backing.free(entry & ENTRY_HANDLE_MASK, length)
            return
        self.pool.free(entry & ENTRY_HANDLE_MASK)
        self.record[_COMPR_DATA_SIZE] -= length
        if state == _HUGE_STATE:
            self.record[_HUGE_PAGES] -= 1
        else:
            self.record[_CODEC_PAGES + codec_number(entry)] -= 1

    def discard(self, offset: int, length: int) -> None:
        """Free the whole pages in a range; they read as zeros. The caller holds the lock.

        Pages covered in part are left alone. Each page counts one notify_free, allocated or not (Linux 6.18).
        """
        first = (offset + _PAGE_MASK) >> PAGE_SHIFT
        end = (offset + length) >> PAGE_SHIFT
        if end <= first:
            return
        self._words[Superblock.NOTIFY_FREE] += end - first
        if end > self.record[_SNAPSHOT_FROM]:
            self.preserve(first, end)
        table, ready = self._table.words, self._table.ready
        chunk, stop = (first >> TABLE_CHUNK_SHIFT) - 1, ((end - 1) >> TABLE_CHUNK_SHIFT) + 1
        while (chunk := ready.find(1, chunk + 1, stop)) >= 0:
            low = max(first, chunk << TABLE_CHUNK_SHIFT)
            high = min(end, (chunk + 1) << TABLE_CHUNK_SHIFT)
            for index, entry in enumerate(table[low:high].tolist(), low):
                if entry:
                    table[index] = 0
                    self._release(entry)
                    self.record[_PAGES_STORED] -= 1

    def write_zeroes(
        self, offset: int, length: int, *, keep: bool = False, fetched: dict[int, Fetched] = NOTHING_FETCHED
    ) -> None:
        """Make a range read as zeros: whole pages are freed, parts of pages are written. The caller holds the lock.

        `keep` leaves no page empty: whole pages become same-filled ones, as if zeros had been written to them.

        Raises:
            NoSpaceError: no room to rewrite a page covered in part.
            PageError: such a page is damaged.
            NotInMemoryError: such a page has to be fetched first, as if nothing had been asked.
        """
        head, whole_end = whole_pages(offset, length)
        self._require_fetched(offset, length, fetched)
        try:
            if head:
                self._modify(offset, memoryview(bytes(head)), fetched)
            if keep and whole_end > head:
                self._store(offset + head >> PAGE_SHIFT, [0] * (whole_end - head >> PAGE_SHIFT), 0)
            if whole_end < length:
                self._modify(offset + whole_end, memoryview(bytes(length - whole_end)), fetched)
        except NoMemoryError as error:
            self._words[Superblock.FAILED_WRITES] += 1
            raise NoSpaceError(str(error)) from error
        except (NoSpaceError, PageError):
            self._words[Superblock.FAILED_WRITES] += 1
            raise
        if not keep:
            self.discard(offset, length)

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, list[int]]]:
        """Yield (first page, entries) of each chunk of the page table that is in use, from page `first` to `end` - 1.

        The caller holds the lock.
        """
        pages = self.disksize >> PAGE_SHIFT if end is None else end
        chunk = (first >> TABLE_CHUNK_SHIFT) - 1
        while (chunk := self._table.ready.find(1, chunk + 1)) >= 0 and chunk << TABLE_CHUNK_SHIFT < pages:
            low = max(first, chunk << TABLE_CHUNK_SHIFT)
            yield low, self._table.words[low : min(pages, chunk + 1 << TABLE_CHUNK_SHIFT)].tolist()

    def entry(self, index: int) -> int:
        """Return the entry of a page. The caller holds the lock."""
        return self._table.words[index] if self._table.ready[index >> TABLE_CHUNK_SHIFT] else 0

    def replace_entry(self, index: int, entry: int) -> None:
        """Change flags in the entry of a page, which is not empty. The caller holds the lock."""
        self._table.words[index] = entry

    def write_back(self, index: int, place: int) -> None:
        """Let a page be only in the backing store, at a place where it was written. The caller holds the lock."""
        entry = self._table.words[index]
        length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
        lasting = entry & ~(_UNTOUCHED | _STATE_MASK | ENTRY_HANDLE_MASK)
        self._require_backing().keep(place, length)
        self._table.words[index] = lasting | _WRITTEN_BACK | place
        self.record[_BACKED_PAGES] += 1
        if length < PAGE_SIZE:
            self.record[_CODEC_PAGES + codec_number(entry)] += 1
        self._release(entry)

    def move_backed(self, index: int, place: int) -> None:
        """Note that what a written-back page is stored as lies elsewhere now too. The caller holds the lock."""
        backing, entry = self._require_backing(), self._table.words[index]
        length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
        backing.keep(place, length)
        self._table.words[index] = entry & ~ENTRY_HANDLE_MASK | place
        backing.free(entry & ENTRY_HANDLE_MASK, length)

    def _require_backing(self) -> Store:
        if self.backing is None:
            raise LookupError("there is no backing store")
        return self.backing

    def access_times(self, first: int, count: int) -> list[int]:
        """Return when pages of a chunk were last read or written, 0 if that is not known. The caller holds the lock."""
        if not self._accessed.ready[first >> ACCESSED_CHUNK_SHIFT]:
            return [0] * count
        return self._times[first : first + count].tolist()

    def class_index(self, length: int) -> int:
        """Return the index of the size class that the kernel looks up for an object of so many bytes.

        Without the header, as zs_lookup_class_index does.
        """
        return self.pool.geometry.lookup(length)

    def page_compressor(self, chosen: Codec, page: bytearray) -> Callable[[], bytes]:
        """Return a function that compresses what is in `page`, for one thread."""
        compress = chosen.compressor(page)
        return lambda: bytes(compress(0))

    def restore(self, index: int, stored: bytes, bits: int) -> None:
        """Store a page anew, compressed otherwise. Limit and high-water mark take no notice (Linux 6.18).

        The caller holds the lock.

        Raises:
            NoMemoryError: there is no room; the page is as it was.
        """
        if index >= self.record[_SNAPSHOT_FROM]:
            self.preserve(index, index + 1)
        old = self._table.words[index]
        handle = self.pool.malloc(len(stored), stored)
        if self._checksums is not None:
            self._checksums[handle] = xxh3_64_intdigest(stored)
        self._table.words[index] = _COMPRESSED | len(stored) << ENTRY_SIZE_SHIFT | handle | bits
        self.record[_COMPR_DATA_SIZE] += len(stored)
        self.record[_CODEC_PAGES + codec_number(bits)] += 1
        self._release(old)

    @property
    def has_snapshot(self) -> bool:
        """Whether a snapshot is being read. The caller holds the lock."""
        return self.record[_SNAPSHOT_FROM] != NOBODY

    def begin_snapshot(self, copies: Copies) -> None:
        """Copy pages there before they change, from SNAPSHOT_FROM on. The caller holds the lock."""
        self._copies = copies

    def end_snapshot(self) -> None:
        """Let go of the copies. The caller holds the lock, and has set SNAPSHOT_FROM to `NOBODY`."""
        self._copies = None

    def preserve(self, first: int, end: int) -> None:
        """Copy pages aside that are about to change and are still to be read. The caller holds the lock."""
        if self._copies:
            self._copies.preserve(self, first, end)

    def read_snapshot(self, first: int, end: int) -> tuple[Sequence[int], bytes | memoryview]:
        """Return what pages were when the snapshot was taken: see `Copies.read`. Valid until it is called again."""
        if self._copies is None:
            raise LookupError("there is no snapshot")
        return self._copies.read(self, first, end)

    def ready_chunks(self) -> bytearray:
        """Return a byte for each chunk of the page table, 0 if it has no page. The caller holds the lock."""
        return bytearray(self._table.ready)

    def element(self, index: int) -> int:
        """Return the pattern of a same-filled page that has one. The caller holds the lock."""
        return self._elements.words[index]

    def checksum(self, handle: int) -> int:
        """Return what was noted as the checksum of an object, 0 without checksums. The caller holds the lock."""
        return 0 if self._checksums is None else self._checksums[handle]

    def place(self, index: int, entry: int, data: bytes | memoryview) -> None:
        """Make an empty page what a snapshot's entry and data say. Limit and high-water mark take no notice.

        The caller holds the lock, and has checked the entry.

        Raises:
            NoMemoryError: there is no room.
        """
        record, state = self.record, entry & _STATE_MASK
        if not self._accessed.ready[index >> ACCESSED_CHUNK_SHIFT]:
            self._accessed.make_ready(index >> ACCESSED_CHUNK_SHIFT)
        self._times[index] = uptime()
        self._table.make_ready(index >> TABLE_CHUNK_SHIFT)
        if state == _SAME_FILLED:
            self._table.words[index] = _SAME_FILLED
            if data:
                self._elements.make_ready(index >> TABLE_CHUNK_SHIFT)
                self._elements.words[index] = int.from_bytes(data, "little")
                self._table.words[index] = _SAME_FILLED | ENTRY_HAS_ELEMENT
            record[_SAME_PAGES] += 1
        else:
            handle = self.pool.malloc(len(data), data)
            if self._checksums is not None:
                self._checksums[handle] = xxh3_64_intdigest(data)
            self._table.words[index] = entry | handle
            record[_COMPR_DATA_SIZE] += len(data)
            if state == _HUGE_STATE:
                record[_HUGE_PAGES] += 1
            else:
                record[_CODEC_PAGES + codec_number(entry)] += 1
        record[_PAGES_STORED] += 1

    def note_filled(self) -> None:
        """Count what was placed as if it had been written. The caller holds the lock."""
        self._words[Superblock.MEM_USED_MAX] = self.pool.pages
        self._words[Superblock.HUGE_PAGES_SINCE] = self.record[_HUGE_PAGES]

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

    def compact(self, work: Work | None = None) -> None:
        """Compact the pool, in slices beside I/O; only one thread may do so at a time."""
        in_slices(self, self._compact(work or Work(WorkKind.COMPACT)))

    def _compact(self, work: Work) -> Iterator[None]:
        for pages in compact(self.pool):
            self._words[Superblock.PAGES_COMPACTED] += pages
            work.done += pages
            work.saved += pages * PAGE_SIZE
            if work.cancelled:
                return
            yield

    def retire(self) -> None:
        """Let go of the regions; the counters stay what they are. The caller holds the lock."""
        self.retired = True
        self._words = memoryview(bytearray(self._words)).cast("Q")

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

    def states(self, first: int, end: int) -> list[Run]:
        """Return what the pages from `first` to `end` - 1 are, or the first of them: see `state_runs`."""
        return list(state_runs(self._table, first, end))

    def class_stats(self) -> list[ClassStat]:
        """Return the pool's size classes at one moment. Takes the lock."""
        with self.lock:
            return class_stats(self.pool)

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

    def request_stat(self) -> RequestStat:
        """Return the request counters. Takes the lock."""
        with self.lock:
            return RequestStat(*self._words[_READS : _WRITE_SECTORS + 1])

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

    def entries(self) -> Iterator[tuple[int, int]]:
        """Yield (page, entry) of each page that is not empty. The caller holds the lock."""
        for first, entries in self.chunks():
            yield from ((index, entry) for index, entry in enumerate(entries, first) if entry)

    def _scan(self) -> Iterator[tuple[int, int]]:
        """Check and count every entry, and yield (handle, length) of those that hold an object."""
        for index, entry in self.entries():
            state = entry & _STATE_MASK
            length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
            if entry & _NEVER_SET:
                raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
            if entry & ENTRY_TAKEN:
                self._table.words[index] = entry & ~ENTRY_TAKEN
            self.record[_PAGES_STORED] += 1
            if state == _SAME_FILLED:
                if length or not self._has_pattern(index, entry & ENTRY_HANDLE_MASK):
                    raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
                self.record[_SAME_PAGES] += 1
                continue
            if state == _WRITTEN_BACK:
                self.record[_BACKED_PAGES] += 1
            if state in (_HUGE_STATE, _WRITTEN_BACK) and length == PAGE_SIZE:
                self.record[_HUGE_PAGES] += state == _HUGE_STATE
            elif (
                state not in (_COMPRESSED, _WRITTEN_BACK)
                # Recompression may leave an object that has a whole page for lack of room for its header (Linux 6.18).
                or not 0 < length < PAGE_SIZE
                or self.identity.algorithms.codecs[codec_number(entry)] is None
            ):
                raise StateError(f"the regions are damaged: the entry of page {index} is {entry:#x}")
            else:
                self.record[_CODEC_PAGES + codec_number(entry)] += 1
            if state == _WRITTEN_BACK:
                continue
            self.record[_COMPR_DATA_SIZE] += length
            yield entry & ENTRY_HANDLE_MASK, length

    def _has_pattern(self, index: int, handle: int) -> bool:
        """Say whether what the entry of a same-filled page has for a handle is right."""
        if handle != ENTRY_HAS_ELEMENT:
            return handle == 0
        return self._elements.ready[index >> TABLE_CHUNK_SHIFT] != 0 and self._elements.words[index] != 0
