"""Pages of a device: into the pool, out of it, to the backing store, and aside for a snapshot."""

from array import array
from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from zramd.backing import Store
from zramd.device.algorithms import codec_number
from zramd.device.codecs import Codec, CodecError
from zramd.device.entry import COMPRESSED, HUGE, SAME_FILLED, STATE_MASK, WRITTEN_BACK, size_of
from zramd.device.fetching import NOTHING_FETCHED, Fetched, NotInMemoryError, PageError, fetch
from zramd.device.snapshot import Copies
from zramd.device.state import DeviceState, uptime
from zramd.device.stream import Prepared
from zramd.layout import (
    ACCESSED_CHUNK_SHIFT,
    ENTRY_HANDLE_MASK,
    ENTRY_HAS_ELEMENT,
    ENTRY_IDLE,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_TAKEN,
    NOBODY,
    PAGE_SIZE,
    TABLE_CHUNK_SHIFT,
    WORD,
    DeviceRecord,
    PoolRecord,
    Superblock,
)

_WORDS = PAGE_SIZE // WORD
ZERO_PAGE = bytes(PAGE_SIZE)
"""What `read` returns for a page of zeros: this very object, or a view of it."""

_UNTOUCHED = ENTRY_IDLE | ENTRY_TAKEN
_HUGE = HUGE | PAGE_SIZE << ENTRY_SIZE_SHIFT
_POOL_PAGES = int(PoolRecord.PAGES)
_PAGES_STORED, _COMPR_DATA_SIZE, _SAME_PAGES, _HUGE_PAGES, _NOTED_PAGES, *_ = map(int, DeviceRecord)
_SNAPSHOT_FROM = int(DeviceRecord.SNAPSHOT_FROM)
_CODEC_PAGES, _BACKED_PAGES = int(DeviceRecord.CODEC_PAGES), int(DeviceRecord.BACKED_PAGES)


class NoSpaceError(Exception):
    """A page cannot be stored: the memory limit is reached or the machine has no memory left."""


class Pages(DeviceState):
    """A device by the page. Whoever calls a method that says so holds the lock."""

    snapshot_step = 128
    """Pages of a snapshot that are read under one hold of the lock."""

    def attach(self, backing: Store | None) -> None:
        """Have a backing store from now on. Takes the lock.

        Raises:
            DamagedObjectError: pages that are written back cannot be there.
        """
        if backing and self.record[_BACKED_PAGES]:
            for _, entry in self.entries():
                if entry & STATE_MASK == WRITTEN_BACK:
                    backing.adopt(entry & ENTRY_HANDLE_MASK, size_of(entry))
        with self.lock:
            self.backing = backing

    def _require_backing(self) -> Store:
        if self.backing is None:
            raise LookupError("there is no backing store")
        return self.backing

    def fetch(self, pages: list[int]) -> dict[int, Fetched]:
        """Read pages from wherever they are. The caller does not hold the lock."""
        return fetch(self, pages)

    def fetch_pages(self, first: int, count: int) -> list[bytes | None]:
        """Read `count` pages from wherever they are, None for one that cannot be. The caller does not hold the lock."""
        found = fetch(self, list(range(first, first + count)))
        return [found[index].page for index in range(first, first + count)]

    def load_page(self, index: int) -> bytes:
        """Return a page that is in memory. The caller holds the lock.

        Raises:
            PageError: it is damaged.
        """
        out: list[bytes | memoryview] = []
        self._load(index, index + 1, out, NOTHING_FETCHED)
        return bytes(out[0])

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
            state = entry & STATE_MASK
            if entry and timed[index >> ACCESSED_CHUNK_SHIFT]:
                times[index] = now
            if entry & _UNTOUCHED:
                table[index] = entry & ~_UNTOUCHED
            if state in (COMPRESSED, HUGE):
                try:
                    data = self.stored(entry)
                    out.append(self.decompress(entry, data) if state == COMPRESSED else data.tobytes())
                except CodecError as error:
                    del out[before:]
                    raise PageError(f"page {index} is damaged: {error}") from error
            elif state == SAME_FILLED and entry & ENTRY_HAS_ELEMENT:
                out.append(self._elements.words[index].to_bytes(WORD, "little") * _WORDS)
            else:
                if state == WRITTEN_BACK:
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

    def page_compressor(self, chosen: Codec, page: bytearray) -> Callable[[], bytes]:
        """Return a function that compresses what is in `page`, for one thread."""
        compress = chosen.compressor(page)
        return lambda: bytes(compress(0))

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
                    entry = SAME_FILLED | ENTRY_HAS_ELEMENT
                else:
                    entry = SAME_FILLED
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
                    entry = COMPRESSED | length << ENTRY_SIZE_SHIFT | handle | bits
                    record[pages_of_codec] += 1
                record[_COMPR_DATA_SIZE] += length
            old = table[index]
            table[index] = entry
            if not old:
                record[_PAGES_STORED] += 1
            elif old & STATE_MASK == COMPRESSED:
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
        state = entry & STATE_MASK
        if state == SAME_FILLED:
            self.record[_SAME_PAGES] -= 1
            return
        length = entry >> ENTRY_SIZE_SHIFT & ENTRY_SIZE_MASK
        if state == WRITTEN_BACK:
            self.record[_BACKED_PAGES] -= 1
            if length < PAGE_SIZE:
                self.record[_CODEC_PAGES + codec_number(entry)] -= 1
            if self.backing:
                self.backing.free(entry & ENTRY_HANDLE_MASK, length)
            return
        self.pool.free(entry & ENTRY_HANDLE_MASK)
        self.record[_COMPR_DATA_SIZE] -= length
        if state == HUGE:
            self.record[_HUGE_PAGES] -= 1
        else:
            self.record[_CODEC_PAGES + codec_number(entry)] -= 1

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
        self._table.words[index] = COMPRESSED | len(stored) << ENTRY_SIZE_SHIFT | handle | bits
        self.record[_COMPR_DATA_SIZE] += len(stored)
        self.record[_CODEC_PAGES + codec_number(bits)] += 1
        self._release(old)

    def write_back(self, index: int, place: int) -> None:
        """Let a page be only in the backing store, at a place where it was written. The caller holds the lock."""
        entry = self._table.words[index]
        length = size_of(entry)
        lasting = entry & ~(_UNTOUCHED | STATE_MASK | ENTRY_HANDLE_MASK)
        self._require_backing().keep(place, length)
        self._table.words[index] = lasting | WRITTEN_BACK | place
        self.record[_BACKED_PAGES] += 1
        if length < PAGE_SIZE:
            self.record[_CODEC_PAGES + codec_number(entry)] += 1
        self._release(entry)

    def move_backed(self, index: int, place: int) -> None:
        """Note that what a written-back page is stored as lies elsewhere now too. The caller holds the lock."""
        backing, entry = self._require_backing(), self._table.words[index]
        length = size_of(entry)
        backing.keep(place, length)
        self._table.words[index] = entry & ~ENTRY_HANDLE_MASK | place
        backing.free(entry & ENTRY_HANDLE_MASK, length)

    def place(self, index: int, entry: int, data: bytes | memoryview) -> None:
        """Make an empty page what a snapshot's entry and data say. Limit and high-water mark take no notice.

        The caller holds the lock, and has checked the entry.

        Raises:
            NoMemoryError: there is no room.
        """
        record, state = self.record, entry & STATE_MASK
        if not self._accessed.ready[index >> ACCESSED_CHUNK_SHIFT]:
            self._accessed.make_ready(index >> ACCESSED_CHUNK_SHIFT)
        self._times[index] = uptime()
        self._table.make_ready(index >> TABLE_CHUNK_SHIFT)
        if state == SAME_FILLED:
            self._table.words[index] = SAME_FILLED
            if data:
                self._elements.make_ready(index >> TABLE_CHUNK_SHIFT)
                self._elements.words[index] = int.from_bytes(data, "little")
                self._table.words[index] = SAME_FILLED | ENTRY_HAS_ELEMENT
            record[_SAME_PAGES] += 1
        else:
            handle = self.pool.malloc(len(data), data)
            if self._checksums is not None:
                self._checksums[handle] = xxh3_64_intdigest(data)
            self._table.words[index] = entry | handle
            record[_COMPR_DATA_SIZE] += len(data)
            if state == HUGE:
                record[_HUGE_PAGES] += 1
            else:
                record[_CODEC_PAGES + codec_number(entry)] += 1
        record[_PAGES_STORED] += 1

    def note_filled(self) -> None:
        """Count what was placed as if it had been written. The caller holds the lock."""
        self._words[Superblock.MEM_USED_MAX] = self.pool.pages
        self._words[Superblock.HUGE_PAGES_SINCE] = self.record[_HUGE_PAGES]

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
