"""Loading, storing and discarding pages: zramd/device/pages.py on the same table, records and counters."""

cdef enum:
    # In place of a length. The data of what is fetched are a whole page.
    DAMAGED = 0xFFFFFFFF
    BACKED = 0xFFFFFFFE
    FETCHED = 0xFFFFFFFD
    UNREADABLE = 0xFFFFFFFC

cdef enum Table:
    ENTRIES, ELEMENTS, ACCESSED

cdef struct Page:
    # What a page is stored as, or was: `length` bytes at `data`; or, with length 0, the pattern of a same-filled page.
    # A page's length is a raw page.
    const uint8_t *data
    uint64_t pattern
    uint64_t checksum  # of the data, where the device has checksums
    uint32_t length
    uint32_t codec  # by number, where it was loaded


cdef class Device:
    """The hot part of a device of the Python engine. Whoever calls a cdef method here holds the device's lock."""

    cdef object page_table
    cdef object elements_table
    cdef object accessed_table
    cdef object algorithms
    cdef tuple owners
    cdef Lock lock
    cdef Pool pool
    cdef uint64_t *table
    cdef uint8_t *table_ready
    cdef uint64_t *elements
    cdef uint8_t *elements_ready
    cdef uint32_t *accessed
    cdef uint8_t *accessed_ready
    cdef uint64_t *checksums  # NULL: there are none
    cdef uint64_t *segments  # of the backing store; NULL: there is none
    cdef object backing_records
    cdef object owner
    cdef uint64_t *superblock
    cdef uint64_t *record
    cdef uint32_t huge_limit
    cdef Copies copies

    def __cinit__(self, device, superblock, tables):
        table, elements, accessed = tables.entries, tables.elements, tables.accessed
        self.page_table, self.elements_table, self.accessed_table = table, elements, accessed
        self.owners = device.record, superblock
        self.owner = weakref.ref(device)
        self.lock = device.lock
        self.algorithms = device.identity.algorithms
        self.pool = Pool(device.pool)
        self.table = <uint64_t *>address(table.region.map)
        self.table_ready = <uint8_t *>address(table.ready)
        self.elements = <uint64_t *>address(elements.region.map)
        self.elements_ready = <uint8_t *>address(elements.ready)
        self.accessed = <uint32_t *>address(accessed.region.map)
        self.accessed_ready = <uint8_t *>address(accessed.ready)
        if device.pool.checksum_region is not None:
            self.checksums = <uint64_t *>address(device.pool.checksum_region.map)
        self.superblock = <uint64_t *>address(superblock.map)
        self.record = <uint64_t *>address(device.record)
        self.huge_limit = device.pool.geometry.huge_limit
        self.copies = Copies(self.pool)
        self.copies.table, self.copies.table_ready = self.table, self.table_ready
        self.copies.elements, self.copies.checksums = self.elements, self.checksums
        self.copies.record = self.record

    def attach(self, records):
        """Have a backing store with these records, or (None) none. The caller holds the lock."""
        self.segments = NULL if records is None else <uint64_t *>address(records)
        self.backing_records = records

    cdef bint _make_ready(self, Table which, uint64_t chunk, uint64_t last) noexcept with gil:
        try:
            (self.page_table, self.elements_table, self.accessed_table)[which].make_ready(chunk, last)
            return True
        except BaseException as error:
            return self.pool._failed(error)

    cdef bint _note_use(self, uint64_t handle) noexcept nogil:
        """Raise the high-water mark, and refuse `handle` if the limit is exceeded."""
        cdef uint64_t used = self.pool.record[Z_POOL_RECORD_PAGES]
        cdef uint64_t limit = self.superblock[Z_SUPERBLOCK_MEM_LIMIT]
        cdef uint64_t highest = max(used, self.superblock[Z_SUPERBLOCK_MEM_USED_MAX])
        self.superblock[Z_SUPERBLOCK_MEM_USED_MAX] = highest
        step("mark-raised")
        self.record[Z_DEVICE_RECORD_NOTED_PAGES] = min(highest, limit) if limit else highest
        if limit and used > limit:
            self.pool.free(handle)
            snprintf(
                self.pool.text,
                sizeof(self.pool.text),
                "the memory limit of %llu bytes is reached",
                <unsigned long long>(limit * Z_PAGE_SIZE),
            )
            return False
        return True

    cdef bint store(self, uint64_t index, const Page *pages, uint64_t count, uint64_t bits) noexcept nogil:
        """Store pages from `index` on; `bits` tell their codec. Return false if there is no room: see the pool's text."""
        cdef uint64_t chunk = index >> Z_TABLE_CHUNK_SHIFT
        cdef uint64_t last = (index + count - 1) >> Z_TABLE_CHUNK_SHIFT
        cdef const Page *end = pages + count
        cdef uint64_t entry, handle, old
        cdef uint64_t pages_of_codec = Z_DEVICE_RECORD_CODEC_PAGES + codec_number(bits)
        cdef uint8_t *payload
        if not count:
            return True
        if (chunk != last or not self.table_ready[chunk]) and not self._make_ready(ENTRIES, chunk, last):
            return False
        if not self.note_access(index, count):
            return False
        if index + count > self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM]:
            self.copies.preserve(index, index + count)
        while pages < end:
            if not pages.length:
                entry = Z_PAGE_STATE_SAME_FILLED << Z_ENTRY_STATE_SHIFT
                if pages.pattern:
                    if not self.elements_ready[index >> Z_TABLE_CHUNK_SHIFT]:
                        if not self._make_ready(ELEMENTS, index >> Z_TABLE_CHUNK_SHIFT, index >> Z_TABLE_CHUNK_SHIFT):
                            return False
                    self.elements[index] = pages.pattern
                    step("element-stored")
                    entry |= Z_ENTRY_HAS_ELEMENT
                self.record[Z_DEVICE_RECORD_SAME_PAGES] += 1
            else:
                handle = self.pool.malloc(pages.length, &payload)
                if not handle:
                    return False
                memcpy(payload, pages.data, pages.length)
                if self.checksums != NULL:
                    self.checksums[handle] = pages.checksum
                step("payload-copied")
                if self.pool.record[Z_POOL_RECORD_PAGES] > self.record[Z_DEVICE_RECORD_NOTED_PAGES]:
                    if not self._note_use(handle):
                        return False
                entry = <uint64_t>pages.length << Z_ENTRY_SIZE_SHIFT | handle
                if pages.length == Z_PAGE_SIZE:
                    entry |= Z_PAGE_STATE_HUGE << Z_ENTRY_STATE_SHIFT
                    self.record[Z_DEVICE_RECORD_HUGE_PAGES] += 1
                    self.superblock[Z_SUPERBLOCK_HUGE_PAGES_SINCE] += 1
                else:
                    entry |= Z_PAGE_STATE_COMPRESSED << Z_ENTRY_STATE_SHIFT | bits
                    self.record[pages_of_codec] += 1
                self.record[Z_DEVICE_RECORD_COMPR_DATA_SIZE] += pages.length
            old = self.table[index]
            store_entry(&self.table[index], entry)
            step("entry-stored")
            if old:
                self._release(old)
            else:
                self.record[Z_DEVICE_RECORD_PAGES_STORED] += 1
            pages += 1
            index += 1
        return True

    cdef bint note_access(self, uint64_t index, uint64_t count) noexcept nogil:
        """Note that pages are written now. Return false if there is no room to."""
        cdef uint64_t chunk = index >> Z_ACCESSED_CHUNK_SHIFT
        cdef uint64_t last = (index + count - 1) >> Z_ACCESSED_CHUNK_SHIFT
        cdef uint32_t now = uptime()
        cdef uint64_t end = index + count
        if (chunk != last or not self.accessed_ready[chunk]) and not self._make_ready(ACCESSED, chunk, last):
            return False
        while index < end:
            self.accessed[index] = now
            index += 1
        return True

    cdef void _release(self, uint64_t entry) noexcept nogil:
        """Free what an entry that is no longer in the table refers to."""
        cdef uint64_t state = entry >> Z_ENTRY_STATE_SHIFT & Z_ENTRY_STATE_MASK
        if state == Z_PAGE_STATE_SAME_FILLED:
            self.record[Z_DEVICE_RECORD_SAME_PAGES] -= 1
            return
        if state == Z_PAGE_STATE_WRITTEN_BACK:
            self._release_backed(entry)
            return
        self.pool.free(entry & Z_ENTRY_HANDLE_MASK)
        self.record[Z_DEVICE_RECORD_COMPR_DATA_SIZE] -= entry >> Z_ENTRY_SIZE_SHIFT & Z_ENTRY_SIZE_MASK
        if state == Z_PAGE_STATE_HUGE:
            self.record[Z_DEVICE_RECORD_HUGE_PAGES] -= 1
        else:
            self.record[Z_DEVICE_RECORD_CODEC_PAGES + codec_number(entry)] -= 1

    cdef void _release_backed(self, uint64_t entry) noexcept nogil:
        cdef uint64_t length = entry >> Z_ENTRY_SIZE_SHIFT & Z_ENTRY_SIZE_MASK
        cdef uint64_t units = (length + Z_OBJECT_OVERHEAD + (1 << Z_BACKING_UNIT_SHIFT) - 1) >> Z_BACKING_UNIT_SHIFT
        cdef uint64_t segment = (entry & Z_ENTRY_HANDLE_MASK) >> Z_SEGMENT_UNITS_SHIFT
        self.record[Z_DEVICE_RECORD_BACKED_PAGES] -= 1
        if length < Z_PAGE_SIZE:
            self.record[Z_DEVICE_RECORD_CODEC_PAGES + codec_number(entry)] -= 1
        if self.segments == NULL:
            return
        self.segments[0] -= units
        self.segments[2 * segment] -= units
        if not self.segments[2 * segment] and not self.segments[2 * segment + 1]:
            self.segments[2 * segment + 1] = self.segments[1]
            self.segments[1] = segment

    cdef uint64_t load(self, uint64_t index, Page *pages, uint64_t count, uint8_t *position) noexcept nogil:
        """Copy what `count` pages from `index` on are stored as to `position`. Decompressing them needs no lock.

        Return how many of them are only in the backing store.
        """
        cdef uint64_t backed = 0
        cdef Page *end = pages + count
        cdef const uint8_t *data
        cdef uint64_t entry, state
        cdef uint32_t now = uptime()
        while pages < end:
            entry = self.table[index] if self.table_ready[index >> Z_TABLE_CHUNK_SHIFT] else 0
            state = entry >> Z_ENTRY_STATE_SHIFT & Z_ENTRY_STATE_MASK
            pages.length = 0
            pages.pattern = 0
            if entry and self.accessed_ready[index >> Z_ACCESSED_CHUNK_SHIFT]:
                self.accessed[index] = now
            if entry & (Z_ENTRY_IDLE | Z_ENTRY_TAKEN):
                store_entry(&self.table[index], entry & ~(Z_ENTRY_IDLE | Z_ENTRY_TAKEN))
            if state == Z_PAGE_STATE_COMPRESSED or state == Z_PAGE_STATE_HUGE:
                data = self.pool.map(entry & Z_ENTRY_HANDLE_MASK)
                if data == NULL:
                    pages.length = DAMAGED
                else:
                    pages.length = entry >> Z_ENTRY_SIZE_SHIFT & Z_ENTRY_SIZE_MASK
                    pages.codec = codec_number(entry)
                    if self.checksums != NULL:
                        pages.checksum = self.checksums[entry & Z_ENTRY_HANDLE_MASK]
                    pages.data = position
                    memcpy(position, data, pages.length)
                    position += pages.length
            elif state == Z_PAGE_STATE_WRITTEN_BACK:
                pages.length = BACKED
                backed += 1
            elif entry & Z_ENTRY_HAS_ELEMENT:
                pages.pattern = self.elements[index]
            pages += 1
            index += 1
        return backed

    cdef void discard(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Free the whole pages in a range."""
        cdef uint64_t index = (offset + Z_PAGE_SIZE - 1) >> Z_PAGE_SHIFT
        cdef uint64_t end = (offset + length) >> Z_PAGE_SHIFT
        cdef uint64_t entry
        if end <= index:
            return
        self.superblock[Z_SUPERBLOCK_NOTIFY_FREE] += end - index
        if end > self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM]:
            self.copies.preserve(index, end)
        while index < end:
            if not self.table_ready[index >> Z_TABLE_CHUNK_SHIFT]:
                index = ((index >> Z_TABLE_CHUNK_SHIFT) + 1) << Z_TABLE_CHUNK_SHIFT
                continue
            entry = self.table[index]
            if entry:
                store_entry(&self.table[index], 0)
                step("entry-cleared")
                self._release(entry)
                self.record[Z_DEVICE_RECORD_PAGES_STORED] -= 1
            index += 1

    def store_pages(self, uint64_t index, Prepared prepared):
        """Store what was prepared, from page `index` on. The caller holds the lock.

        Raises:
            NoMemoryError: there is no room for a page.
        """
        cdef bint stored = self.store(index, prepared.pages, prepared.count, prepared.bits)
        self.raise_error()
        if not stored:
            raise NoMemoryError(self.pool.text.decode())

    def discard_range(self, uint64_t offset, uint64_t length):
        """Free the whole pages in a range. The caller holds the lock."""
        self.discard(offset, length)
        self.raise_error()

    def begin_snapshot(self, covered, copied, store):
        """Copy pages there before they change. The caller holds the lock."""
        self.copies.begin(covered, copied, store)

    def end_snapshot(self):
        """Let go of the copies. The caller holds the lock."""
        self.copies.end()

    def preserve_pages(self, uint64_t first, uint64_t end):
        """Copy pages aside that are about to change and are still to be read. The caller holds the lock."""
        if end > self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM]:
            self.copies.preserve(first, end)

    def read_snapshot(self, uint64_t first, uint64_t end, entries, data):
        """Fill in the entries and the data of pages, and return the bytes of the latter. The caller holds the lock.

        Raises:
            CodecError: a page is damaged.
        """
        return self.copies.read(first, end, <uint64_t *>address(entries), <uint8_t *>address(data))

    cdef int raise_error(self) except -1:
        if self.pool.failing:
            raise self.pool.take_error()
        return 0


cdef class Prepared:
    """Pages as they will be stored."""

    cdef Page *pages
    cdef uint64_t count
    cdef uint64_t bits
    cdef uint8_t *data

    def __dealloc__(self):
        free(self.pages)
        free(self.data)


cdef class Stream:
    """What one thread compresses with, and the buffer that it compresses from: see zramd/device/stream.py.

    `scratch` has room for as many pages as the buffer, compressed, and `pages` describes them. `codecs` are those of the
    device, by number, of which `primary` compresses.
    """

    cdef readonly object buffer
    cdef readonly object view
    cdef Device device
    cdef list owners
    cdef CodecState *codecs[8]
    cdef CodecState *primary
    cdef readonly uint64_t generation
    cdef readonly uint64_t bits
    cdef uint8_t *start
    cdef uint64_t bytes
    cdef uint8_t *scratch
    cdef Page *pages
    cdef uint64_t capacity

    def __cinit__(self, Device device, bytearray buffer, algorithms):
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.device = device
        self.choose(algorithms, device.record[Z_DEVICE_RECORD_GENERATION])
        self.start = <uint8_t *>address(buffer)
        self.bytes = len(buffer)
        self.capacity = self.bytes >> Z_PAGE_SHIFT
        self.scratch = <uint8_t *>malloc(self.capacity * Z_PAGE_SIZE + self.primary.bound)
        self.pages = <Page *>calloc(self.capacity + 1, sizeof(Page))
        if self.scratch == NULL or self.pages == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.scratch)
        free(self.pages)

    def choose(self, algorithms, uint64_t generation):
        """Take the codecs of a device, and compress with what is primary. The caller holds the lock."""
        cdef Codec made
        number = algorithms.number(0)
        owners = []
        for place, chosen in enumerate(algorithms.codecs):
            self.codecs[place] = NULL
            if chosen is not None:
                made = Codec(chosen, place == number)
                owners.append(made)
                self.codecs[place] = &made.state
        self.primary = self.codecs[number]
        self.bits = entry_bits(number)
        self.generation = generation
        self.owners = owners

    cdef uint64_t prepare_pages(self, const uint8_t *page, uint64_t count, Page *pages, uint8_t *target) noexcept nogil:
        """Compress pages to `target`. Return the bytes used: a page's at most for each, and `bound` behind the last."""
        cdef uint8_t *position = target
        for _ in range(count):
            # The last bytes of the first and the last word differ on most pages.
            if page[7] == page[Z_PAGE_SIZE - 1] and not memcmp(page, page + Z_WORD, Z_PAGE_SIZE - Z_WORD):
                pages.length = 0
                memcpy(&pages.pattern, page, Z_WORD)
            else:
                pages.length = compress(self.primary, page, position)
                if pages.length < self.device.huge_limit:
                    pages.data = position
                    position += pages.length
                else:
                    pages.length = Z_PAGE_SIZE
                    pages.data = page
                if self.device.checksums != NULL:
                    pages.checksum = XXH3_64bits(pages.data, pages.length)
            page += Z_PAGE_SIZE
            pages += 1
        return position - target

    def prepare(self, uint64_t start, uint64_t length, uint64_t offset):
        """Compress the whole pages of a write. No lock is needed. Raw pages stay in the buffer."""
        cdef uint64_t head = min((Z_PAGE_SIZE - offset) & (Z_PAGE_SIZE - 1), length)
        cdef uint64_t count = (length - head) >> Z_PAGE_SHIFT
        cdef Prepared prepared = Prepared()
        cdef uint64_t used, number
        if count > self.capacity:
            raise ValueError(f"{count} pages are not in a buffer of {self.capacity}")
        prepared.count = count
        prepared.bits = self.bits
        prepared.pages = <Page *>malloc(max(count, 1) * sizeof(Page))
        if prepared.pages == NULL:
            raise MemoryError
        with nogil:
            used = self.prepare_pages(self.start + start + head, count, prepared.pages, self.scratch)
        prepared.data = <uint8_t *>malloc(max(used, 1))
        if prepared.data == NULL:
            raise MemoryError
        memcpy(prepared.data, self.scratch, used)
        for number in range(count):
            if 0 < prepared.pages[number].length < Z_PAGE_SIZE:
                prepared.pages[number].data = prepared.data + (prepared.pages[number].data - self.scratch)
        return prepared

    cdef bint expand(self, const Page *page, uint8_t *target) noexcept nogil:
        """Make a whole page of one that was loaded; say whether it is not damaged."""
        cdef uint64_t number
        if page.length == DAMAGED or page.length == UNREADABLE or page.length == BACKED:
            return False
        if page.length == FETCHED:
            memcpy(target, page.data, Z_PAGE_SIZE)
            return True
        if page.length and self.device.checksums != NULL and XXH3_64bits(page.data, page.length) != page.checksum:
            return False
        if page.length == Z_PAGE_SIZE:
            memcpy(target, page.data, Z_PAGE_SIZE)
        elif page.length == 0:
            if page.pattern == 0:
                memset(target, 0, Z_PAGE_SIZE)
            else:
                for number in range(Z_PAGE_SIZE // Z_WORD):
                    memcpy(target + number * Z_WORD, &page.pattern, Z_WORD)
        elif self.codecs[page.codec] == NULL:
            return False
        else:
            return decompress(self.codecs[page.codec], page.data, page.length, target)
        return True

    def load_pages(self, uint64_t first, uint64_t end, list out, bytes zero_page):
        """Append the pages `first` to `end` - 1 to `out`. The caller holds the device's lock.

        Return which of them are only in the backing store; in their place there are zeros.

        Raises:
            CodecError: a page is damaged: its argument is which; those before it are in `out`.
        """
        cdef Page page
        cdef bytes whole
        cdef uint64_t index
        if self.generation != self.device.record[Z_DEVICE_RECORD_GENERATION]:
            self.choose(self.device.algorithms, self.device.record[Z_DEVICE_RECORD_GENERATION])
        backed = []
        for index in range(first, end):
            if self.device.load(index, &page, 1, self.scratch):
                backed.append(index)
                page.length = 0
            if page.length == 0 and page.pattern == 0:
                out.append(zero_page)
                continue
            whole = PyBytes_FromStringAndSize(NULL, Z_PAGE_SIZE)
            if not self.expand(&page, <uint8_t *><char *>whole):
                raise CodecError(index)
            out.append(whole)
        return backed
