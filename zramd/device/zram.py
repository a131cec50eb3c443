"""The zram device: pages in, compressed objects in the pool, pages out.

The device is a monitor: whoever calls a method that says so holds `lock`, for a whole batch of requests at a time.
Compression is the one expensive step that needs no lock; a `Stream` does it before the lock is taken.
"""

from collections.abc import Iterator
from functools import cached_property

from zramd.device.entry import STATE_MASK, WRITTEN_BACK
from zramd.device.fetching import NOTHING_FETCHED, Fetched, NotInMemoryError, PageError
from zramd.device.pages import NoSpaceError, Pages
from zramd.device.slices import in_slices
from zramd.device.stream import Prepared, Stream, whole_pages
from zramd.device.work import Work, WorkKind
from zramd.layout import (
    PAGE_SHIFT,
    PAGE_SIZE,
    TABLE_CHUNK_SHIFT,
    DeviceRecord,
    Superblock,
)
from zramd.memory import NoMemoryError
from zramd.zsmalloc import compact

_PAGE_MASK = PAGE_SIZE - 1

_PAGES_STORED, _GENERATION = int(DeviceRecord.PAGES_STORED), int(DeviceRecord.GENERATION)
_SNAPSHOT_FROM = int(DeviceRecord.SNAPSHOT_FROM)
_READS, _READ_SECTORS = int(Superblock.READS), int(Superblock.READ_SECTORS)
_WRITES, _WRITE_SECTORS = int(Superblock.WRITES), int(Superblock.WRITE_SECTORS)


class Device(Pages):
    """One zram device: reads, writes and discards of any bytes."""

    @cached_property
    def _scratch(self) -> Stream:
        return self.stream(bytearray(PAGE_SIZE))

    def stream(self, buffer: bytearray) -> Stream:
        """Return a stream for a thread that receives into `buffer`."""
        return Stream(buffer, self._huge_limit, self.identity.algorithms, self.record[_GENERATION])

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

        `prepared` is what the stream has just made of the whole pages in them, or made since it last chose its codec;
        pages covered in part are read, modified and compressed here.

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
            if self.entry(index) & STATE_MASK == WRITTEN_BACK
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
