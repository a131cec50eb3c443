"""Copy on write for a snapshot: zramd/device/snapshot.py on the same memory."""


cdef class Copies:
    """What pages of a device were before they changed. Whoever calls a method here holds the device's lock."""

    cdef Pool pool
    cdef tuple owners
    cdef const uint64_t *table
    cdef const uint8_t *table_ready
    cdef const uint64_t *elements
    cdef const uint64_t *checksums
    cdef uint64_t *record
    cdef const uint8_t *covered
    cdef uint64_t *copied
    cdef uint64_t *store

    def __cinit__(self, Pool pool):
        self.pool = pool

    cdef int begin(self, covered, copied, store) except -1:
        self.owners = covered, copied, store
        self.covered = <const uint8_t *>address(covered)
        self.copied = <uint64_t *>address(copied)
        self.store = <uint64_t *>address(store)
        return 0

    cdef void end(self):
        self.owners = None
        self.covered = NULL
        self.copied = self.store = NULL

    cdef uint64_t look(self, uint64_t index, const uint8_t **data, uint64_t *checksum) noexcept nogil:
        """Return the entry of a page as a snapshot has it; and its data, NULL if there are none."""
        cdef uint64_t entry = self.table[index] if self.table_ready[index >> Z_TABLE_CHUNK_SHIFT] else 0
        cdef uint64_t state = entry >> Z_ENTRY_STATE_SHIFT & Z_ENTRY_STATE_MASK
        data[0] = NULL
        checksum[0] = 0
        if state == Z_PAGE_STATE_COMPRESSED or state == Z_PAGE_STATE_HUGE:
            data[0] = self.pool.map(entry & Z_ENTRY_HANDLE_MASK)
            if self.checksums != NULL:
                checksum[0] = self.checksums[entry & Z_ENTRY_HANDLE_MASK]
        elif state == Z_PAGE_STATE_SAME_FILLED and entry & Z_ENTRY_HAS_ELEMENT:
            data[0] = <const uint8_t *>&self.elements[index]
            return entry & Z_ENTRY_LASTING_MASK | Z_WORD << Z_ENTRY_SIZE_SHIFT
        elif state == Z_PAGE_STATE_WRITTEN_BACK:
            return entry & (Z_ENTRY_LASTING_MASK | Z_ENTRY_HANDLE_MASK)
        return entry & Z_ENTRY_LASTING_MASK

    cdef void preserve(self, uint64_t first, uint64_t end) noexcept nogil:
        """Copy aside what pages that are still to be read are."""
        cdef uint64_t index = max(first, self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM])
        cdef uint64_t entry, checksum, length, words, position
        cdef const uint8_t *data
        while index < end:
            if not self.covered[index >> Z_TABLE_CHUNK_SHIFT]:
                index = ((index >> Z_TABLE_CHUNK_SHIFT) + 1) << Z_TABLE_CHUNK_SHIFT
                continue
            if not self.copied[index]:
                entry = self.look(index, &data, &checksum)
                position = 0
                if data != NULL:
                    length = entry >> Z_ENTRY_SIZE_SHIFT & Z_ENTRY_SIZE_MASK
                    words = 1 + (length + Z_WORD - 1) // Z_WORD
                    position = self.record[Z_DEVICE_RECORD_SNAPSHOT_USED]
                    if position + words > self.record[Z_DEVICE_RECORD_SNAPSHOT_READY]:
                        self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM] = Z_NOBODY
                        return
                    self.store[position] = checksum
                    memcpy(&self.store[position + 1], data, length)
                    self.record[Z_DEVICE_RECORD_SNAPSHOT_USED] = position + words
                self.copied[index] = Z_COPIED | entry | position
            index += 1

    cdef uint64_t read(self, uint64_t first, uint64_t end, uint64_t *entries, uint8_t *data) except? 0:
        """Fill in the entries and the data of pages, which are no longer to be read. Return the bytes of the data."""
        cdef uint64_t length = 0
        cdef uint64_t damaged = self.collect(first, end, entries, data, &length)
        if damaged != end:
            raise CodecError(f"page {damaged} is damaged")
        self.record[Z_DEVICE_RECORD_SNAPSHOT_FROM] = end
        return length

    cdef uint64_t collect(
        self, uint64_t first, uint64_t end, uint64_t *entries, uint8_t *buffer, uint64_t *used
    ) noexcept nogil:
        """Copy the data of pages to `buffer`. Return the first that is damaged, or the end."""
        cdef uint64_t index, entry, checksum, length, position
        cdef const uint8_t *data
        for index in range(first, end):
            if self.copied[index]:
                entry = self.copied[index] & ~Z_COPIED
                position = 0
                if entry >> Z_ENTRY_STATE_SHIFT & Z_ENTRY_STATE_MASK != Z_PAGE_STATE_WRITTEN_BACK:
                    position = entry & Z_ENTRY_HANDLE_MASK
                    entry &= Z_ENTRY_LASTING_MASK
                data, checksum = NULL, 0
                if position:
                    data, checksum = <const uint8_t *>&self.store[position + 1], self.store[position]
            else:
                entry = self.look(index, &data, &checksum)
            length = entry >> Z_ENTRY_SIZE_SHIFT & Z_ENTRY_SIZE_MASK
            if entry >> Z_ENTRY_STATE_SHIFT & Z_ENTRY_STATE_MASK == Z_PAGE_STATE_WRITTEN_BACK:
                length = 0
            if length and (data == NULL or checksum and XXH3_64bits(data, length) != checksum):
                return index
            if length:
                memcpy(buffer + used[0], data, length)
                used[0] += length
            entries[0] = entry
            entries += 1
        return end
