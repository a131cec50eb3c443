"""Replies to a segment of requests, gathered for one send: those of zramd/nbd/replies.py that are common."""

cdef enum:
    MAX_REPLY = 512  # bytes of a reply without the contents of pages
    MAX_PAGE_REPLY = 4096 + 64  # bytes of a page in the reply to a read, where it is a chunk of its own

cdef struct Request:
    uint64_t cookie
    uint64_t offset
    uint64_t length
    uint64_t page  # the first of its pages in the stream's
    const uint8_t *payload  # of a write
    uint16_t command
    bint failed
    bint fetched  # its pages were read, without the device's lock


cdef class Replies:
    """`size` bytes of replies, at `start`, where there is `room` for what a segment needs at most.

    `damage` says which page the last read failed at.
    """

    cdef Stream stream
    cdef bint structured
    cdef bint extended
    cdef uint8_t *start
    cdef uint64_t room
    cdef uint64_t size
    cdef char damage[64]

    def __cinit__(self, Stream stream, uint64_t room, bint structured, bint extended):
        self.stream = stream
        self.structured = structured
        self.extended = extended
        self.room = room
        self.start = <uint8_t *>malloc(room)
        if self.start == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.start)

    cdef void done(self, const Request *request) noexcept nogil:
        """Add the reply to a request that is done and has nothing to return."""
        if self.extended:
            self.put_chunk(request, Z_CHUNK_DONE, Z_CHUNK_NONE, 0)
        else:
            self.put_simple(request, 0)

    cdef void fail(self, const Request *request, uint32_t error, const char *text) noexcept nogil:
        """Add the reply to a request that failed; only chunks carry the text."""
        cdef size_t length = strlen(text)
        cdef uint8_t *out
        if not self.structured:
            self.put_simple(request, error)
            return
        self.put_chunk(request, Z_CHUNK_DONE, Z_CHUNK_ERROR, 6 + length)
        out = put16(put32(self.start + self.size, error), length)
        memcpy(out, text, length)
        self.size += 6 + length

    cdef bint read(self, const Request *request) noexcept nogil:
        """Add the reply to a read of whole pages. Return false, and add nothing, if one is damaged."""
        cdef uint64_t before = self.size
        cdef bint whole
        if self.structured:
            whole = self.put_runs(request)
        else:
            self.put_simple(request, 0)
            whole = self.put_pages(request, 0, request.length >> Z_PAGE_SHIFT)
        if not whole:
            self.size = before
        return whole

    cdef void put_simple(self, const Request *request, uint32_t error) noexcept nogil:
        cdef uint8_t *out = put32(self.start + self.size, Z_SIMPLE_REPLY_MAGIC)
        out = put64(put32(out, error), request.cookie)
        self.size = out - self.start

    cdef void put_chunk(
        self, const Request *request, unsigned flags, unsigned kind, uint64_t length
    ) noexcept nogil:
        """Add the header of a chunk with `length` bytes of payload."""
        cdef uint8_t *out = put32(self.start + self.size, Z_EXTENDED_CHUNK_MAGIC if self.extended else Z_CHUNK_MAGIC)
        out = put64(put16(put16(out, flags), kind), request.cookie)
        out = put64(put64(out, request.offset), length) if self.extended else put32(out, length)
        self.size = out - self.start

    cdef bint put_runs(self, const Request *request) noexcept nogil:
        """Add data as data and zeros as holes."""
        cdef const Page *pages = self.stream.pages + request.page
        cdef uint64_t count = request.length >> Z_PAGE_SHIFT
        cdef uint64_t first = 0, end, offset, size
        cdef bint is_hole
        cdef unsigned flags
        while first < count:
            is_hole = pages[first].length == 0 and pages[first].pattern == 0
            end = first + 1
            while end < count and (pages[end].length == 0 and pages[end].pattern == 0) == is_hole:
                end += 1
            offset, size = request.offset + first * Z_PAGE_SIZE, (end - first) * Z_PAGE_SIZE
            flags = Z_CHUNK_DONE if end == count else 0
            if is_hole:
                self.put_chunk(request, flags, Z_CHUNK_OFFSET_HOLE, Z_WORD + 4)
                put32(put64(self.start + self.size, offset), size)
                self.size += Z_WORD + 4
            else:
                self.put_chunk(request, flags, Z_CHUNK_OFFSET_DATA, Z_WORD + size)
                put64(self.start + self.size, offset)
                self.size += Z_WORD
                if not self.put_pages(request, first, end):
                    return False
            first = end
        return True

    cdef bint put_pages(self, const Request *request, uint64_t first, uint64_t end) noexcept nogil:
        """Add pages of a read, numbered from its offset on."""
        cdef uint64_t number
        cdef bint unreadable
        for number in range(first, end):
            if not self.stream.expand(self.stream.pages + request.page + number, self.start + self.size):
                unreadable = self.stream.pages[request.page + number].length == UNREADABLE
                snprintf(
                    self.damage,
                    sizeof(self.damage),
                    "page %llu cannot be read" if unreadable else "page %llu is damaged",
                    <unsigned long long>((request.offset >> Z_PAGE_SHIFT) + number),
                )
                return False
            self.size += Z_PAGE_SIZE
        return True
