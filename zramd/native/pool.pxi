"""malloc and free of zramd/zsmalloc/pool.py: the same choices, on the same records and regions."""

cdef struct Zspage:
    uint16_t used
    uint16_t free
    uint16_t fresh
    uint8_t size_class
    uint8_t unused
    uint32_t following
    uint32_t preceding

cdef struct Arena:
    Zspage *zspages
    uint32_t *populated
    uint64_t *record

cdef struct SizeClass:
    uint64_t *record
    uint64_t *heads
    uint64_t *counts
    Arena *arena
    uint8_t *memory
    const uint8_t *group_of
    uint64_t span
    uint64_t size
    uint64_t word
    uint32_t index
    uint32_t pages

if sizeof(Zspage) != Z_ZSPAGE_BYTES:
    raise ImportError("a zspage record is not laid out as in zramd/layout.py")


cdef void regroup(SizeClass *state, uint64_t zspage, unsigned before, unsigned after) noexcept nogil:
    """Move a zspage to the head of another fullness list; group 11, which is full or no group, has none."""
    cdef Zspage *zspages = state.arena.zspages
    cdef uint64_t head
    cdef uint32_t neighbour, previous
    if before != Z_FULL:
        state.counts[before] -= 1
        neighbour = zspages[zspage].following
        if state.heads[before] == zspage + 1:
            state.heads[before] = neighbour
            if not neighbour:
                state.record[Z_CLASS_RECORD_FILLED] &= ~(<uint64_t>1 << before)
        else:
            previous = zspages[zspage].preceding
            zspages[previous - 1].following = neighbour
            if neighbour:
                zspages[neighbour - 1].preceding = previous
    if after != Z_FULL:
        state.counts[after] += 1
        head = state.heads[after]
        zspages[zspage].following = <uint32_t>head
        state.heads[after] = zspage + 1
        if head:
            zspages[head - 1].preceding = <uint32_t>(zspage + 1)
        else:
            state.record[Z_CLASS_RECORD_FILLED] |= <uint64_t>1 << after


cdef class Pool:
    """A pool of the Python engine, whose lock is held by whoever calls anything here.

    Attributes:
        text: why there was no memory.
        error: what else went wrong in Python, if `failing`; it has to be raised.
    """

    cdef object pool
    cdef list arena_objects
    cdef Arena *arenas
    cdef SizeClass *states
    cdef SizeClass *class_for[4097]
    cdef uint64_t *handles
    cdef uint64_t *record
    cdef char text[256]
    cdef object error
    cdef bint failing

    def __cinit__(self, pool):
        cdef SizeClass *state
        cdef Arena *arena
        self.pool = pool
        self.arena_objects = list(pool.arenas)
        self.arenas = <Arena *>calloc(len(pool.arenas), sizeof(Arena))
        self.states = <SizeClass *>calloc(len(pool.classes), sizeof(SizeClass))
        if self.arenas == NULL or self.states == NULL:
            raise MemoryError
        self.handles = <uint64_t *>address(pool.handle_region.map)
        self.record = <uint64_t *>address(pool.record)
        for number, column in enumerate(pool.arenas):
            arena = &self.arenas[number]
            arena.zspages = <Zspage *>address(column.zspages)
            arena.populated = <uint32_t *>address(column.populated)
            arena.record = <uint64_t *>address(column.record)
        for python in pool.classes:
            state = &self.states[python.size_class.index]
            if state.size:
                continue
            state.record = <uint64_t *>address(python.record)
            state.heads = state.record + Z_CLASS_RECORD_HEADS
            state.counts = state.record + Z_CLASS_RECORD_COUNTS
            state.arena = &self.arenas[python.pages - 1]
            state.memory = <uint8_t *>address(python.map)
            state.group_of = <const uint8_t *><const char *>python.group_of
            state.span = python.span
            state.size = python.size
            state.word = python.word
            state.index = python.size_class.index
            state.pages = python.pages
        for length in range(1, Z_PAGE_SIZE + 1):
            self.class_for[length] = &self.states[pool.class_for[length].size_class.index]

    def __dealloc__(self):
        free(self.arenas)
        free(self.states)

    cdef bint _failed(self, object error) noexcept:
        """Keep what went wrong in Python."""
        if isinstance(error, NoMemoryError):
            self.say(str(error).encode())
        else:
            self.error = error
            self.failing = True
            self.say(b"the server failed")
        return False

    cdef object take_error(self):
        """Return what went wrong in Python, once."""
        error, self.error, self.failing = self.error, None, False
        return error

    cdef void say(self, const char *text) noexcept nogil:
        """Set the text."""
        snprintf(self.text, sizeof(self.text), "%s", text)

    cdef bint _grow_handles(self) noexcept with gil:
        try:
            self.pool.grow_handles()
            return True
        except BaseException as error:
            return self._failed(error)

    cdef bint _grow(self, SizeClass *state) noexcept with gil:
        try:
            self.arena_objects[state.pages - 1].grow()
            return True
        except BaseException as error:
            return self._failed(error)

    cdef void _shrink(self, SizeClass *state) noexcept with gil:
        try:
            self.arena_objects[state.pages - 1].shrink()
        except BaseException as error:
            self._failed(error)

    cdef uint64_t malloc(self, uint32_t length, uint8_t **payload) noexcept nogil:
        """Allocate an object of `length` bytes, which are at `payload`. Return its handle, or 0: see `text`."""
        cdef SizeClass *state = self.class_for[length]
        cdef Zspage *zspages = state.arena.zspages
        cdef Zspage *zspage
        cdef uint64_t handle = self.record[Z_POOL_RECORD_FREE_HANDLE]
        cdef uint64_t filled, number, index
        cdef uint8_t *start
        cdef unsigned group, after
        if not handle and self.record[Z_POOL_RECORD_NEXT_HANDLE] >= self.record[Z_POOL_RECORD_READY_HANDLES]:
            if not self._grow_handles():
                return 0
        filled = state.record[Z_CLASS_RECORD_FILLED]
        if filled:
            group = highest_bit(filled)
            number = state.heads[group] - 1
            zspage = &zspages[number]
            zspage.used += 1
            after = state.group_of[zspage.used]
            if after != group:
                regroup(state, number, group, after)
            if zspage.free:
                index = zspage.free - 1
                start = state.memory + number * state.span + index * state.size
                zspage.free = <uint16_t>((<uint64_t *>start)[0] >> 1)
            else:
                index = zspage.fresh
                zspage.fresh += 1
                start = state.memory + number * state.span + index * state.size
        else:
            if not state.arena.record[Z_ARENA_RECORD_POPULATED] and not self._grow(state):
                return 0
            state.arena.record[Z_ARENA_RECORD_POPULATED] -= 1
            if state.arena.record[Z_ARENA_RECORD_POPULATED] == state.arena.record[Z_ARENA_RECORD_LOW]:
                eventfd_write(<int>state.arena.record[Z_ARENA_RECORD_WAKE], 1)
            number = state.arena.populated[state.arena.record[Z_ARENA_RECORD_POPULATED]]
            zspage = &zspages[number]
            zspage.size_class = <uint8_t>(state.index + 1)
            zspage.used = zspage.fresh = 1
            zspage.free = 0
            state.record[Z_CLASS_RECORD_ZSPAGES] += 1
            regroup(state, number, Z_FULL, state.group_of[1])
            self.record[Z_POOL_RECORD_PAGES] += state.pages
            index = 0
            start = state.memory + number * state.span
        state.record[Z_CLASS_RECORD_LIVE] += 1
        if handle:
            self.record[Z_POOL_RECORD_FREE_HANDLE] = self.handles[handle] >> 1
        else:
            handle = self.record[Z_POOL_RECORD_NEXT_HANDLE]
            self.record[Z_POOL_RECORD_NEXT_HANDLE] += 1
            if handle == self.record[Z_POOL_RECORD_LOW_HANDLE]:
                eventfd_write(<int>self.record[Z_POOL_RECORD_WAKE], 1)
        self.handles[handle] = number << Z_HANDLE_ZSPAGE_SHIFT | index << Z_HANDLE_INDEX_SHIFT | state.word
        step("handle-stored")
        if state.size != Z_PAGE_SIZE:
            (<uint64_t *>start)[0] = handle << 1 | Z_HEADER_IN_USE
            step("header-stored")
            start += Z_WORD
        payload[0] = start
        return handle

    cdef const uint8_t *map(self, uint64_t handle) noexcept nogil:
        """Return where an object's payload lies, NULL if there is no such object."""
        cdef uint64_t word = self.handles[handle]
        cdef SizeClass *state
        cdef const uint8_t *start
        if not word & Z_HANDLE_IN_USE:
            return NULL
        state = &self.states[word >> Z_HANDLE_CLASS_SHIFT & Z_HANDLE_CLASS_MASK]
        start = state.memory + (word >> Z_HANDLE_ZSPAGE_SHIFT) * state.span
        if state.size != Z_PAGE_SIZE:
            start += (word >> Z_HANDLE_INDEX_SHIFT & Z_HANDLE_INDEX_MASK) * state.size + Z_WORD
        return start

    cdef void free(self, uint64_t handle) noexcept nogil:
        """Free an object."""
        cdef uint64_t word = self.handles[handle]
        cdef SizeClass *state = &self.states[word >> Z_HANDLE_CLASS_SHIFT & Z_HANDLE_CLASS_MASK]
        cdef uint64_t number = word >> Z_HANDLE_ZSPAGE_SHIFT
        cdef uint64_t index = word >> Z_HANDLE_INDEX_SHIFT & Z_HANDLE_INDEX_MASK
        cdef Zspage *zspage = &state.arena.zspages[number]
        cdef unsigned before = state.group_of[zspage.used]
        cdef unsigned after
        zspage.used -= 1
        state.record[Z_CLASS_RECORD_LIVE] -= 1
        if zspage.used:
            (<uint64_t *>(state.memory + number * state.span + index * state.size))[0] = <uint64_t>zspage.free << 1
            step("object-freed")
            zspage.free = <uint16_t>(index + 1)
            after = state.group_of[zspage.used]
            if after != before:
                regroup(state, number, before, after)
        else:
            regroup(state, number, before, Z_FULL)
            state.record[Z_CLASS_RECORD_ZSPAGES] -= 1
            zspage.size_class = 0
            state.arena.populated[state.arena.record[Z_ARENA_RECORD_POPULATED]] = <uint32_t>number
            state.arena.record[Z_ARENA_RECORD_POPULATED] += 1
            if state.arena.record[Z_ARENA_RECORD_POPULATED] > state.arena.record[Z_ARENA_RECORD_RESERVE]:
                self._shrink(state)
            step("zspage-freed")
            self.record[Z_POOL_RECORD_PAGES] -= state.pages
        self.handles[handle] = self.record[Z_POOL_RECORD_FREE_HANDLE] << 1
        step("handle-freed")
        self.record[Z_POOL_RECORD_FREE_HANDLE] = handle
