"""Locks, addresses, and stores that other processes and the wire can rely on."""

cdef extern from "layout.h" nogil:
    uint64_t Z_PAGE_SIZE, Z_PAGE_SHIFT, Z_WORD, Z_TABLE_CHUNK_SHIFT
    uint64_t Z_ENTRY_HANDLE_MASK, Z_ENTRY_SIZE_SHIFT, Z_ENTRY_SIZE_MASK, Z_ENTRY_STATE_SHIFT, Z_ENTRY_STATE_MASK
    uint64_t Z_ENTRY_HAS_ELEMENT, Z_ENTRY_IDLE, Z_ENTRY_PRIORITY_SHIFT, Z_ENTRY_PRIORITY_MASK, Z_ENTRY_ALTERNATE
    uint64_t Z_ENTRY_TAKEN, Z_ACCESSED_CHUNK_SHIFT, Z_PRIORITIES, Z_CODECS, Z_NOBODY
    uint64_t Z_BACKING_UNIT_SHIFT, Z_SEGMENT_UNITS_SHIFT, Z_OBJECT_OVERHEAD
    uint64_t Z_PAGE_STATE_SAME_FILLED, Z_PAGE_STATE_COMPRESSED, Z_PAGE_STATE_HUGE
    uint64_t Z_PAGE_STATE_WRITTEN_BACK
    uint64_t Z_HANDLE_IN_USE, Z_HANDLE_INDEX_SHIFT, Z_HANDLE_INDEX_MASK, Z_HANDLE_CLASS_SHIFT, Z_HANDLE_CLASS_MASK
    uint64_t Z_HANDLE_ZSPAGE_SHIFT, Z_HEADER_IN_USE
    uint64_t Z_ZSPAGE_BYTES, Z_FULL
    uint64_t Z_ARENA_RECORD_POPULATED, Z_ARENA_RECORD_RESERVE, Z_ARENA_RECORD_LOW, Z_ARENA_RECORD_WAKE
    uint64_t Z_CLASS_RECORD_FILLED, Z_CLASS_RECORD_ZSPAGES, Z_CLASS_RECORD_LIVE, Z_CLASS_RECORD_HEADS
    uint64_t Z_CLASS_RECORD_COUNTS
    uint64_t Z_POOL_RECORD_PAGES, Z_POOL_RECORD_FREE_HANDLE, Z_POOL_RECORD_NEXT_HANDLE, Z_POOL_RECORD_READY_HANDLES
    uint64_t Z_POOL_RECORD_LOW_HANDLE, Z_POOL_RECORD_WAKE
    uint64_t Z_DEVICE_RECORD_PAGES_STORED, Z_DEVICE_RECORD_COMPR_DATA_SIZE, Z_DEVICE_RECORD_SAME_PAGES
    uint64_t Z_DEVICE_RECORD_HUGE_PAGES, Z_DEVICE_RECORD_NOTED_PAGES, Z_DEVICE_RECORD_GENERATION
    uint64_t Z_DEVICE_RECORD_BACKED_PAGES, Z_DEVICE_RECORD_CODEC_PAGES
    uint64_t Z_DEVICE_RECORD_SNAPSHOT_FROM, Z_DEVICE_RECORD_SNAPSHOT_USED, Z_DEVICE_RECORD_SNAPSHOT_READY
    uint64_t Z_ENTRY_LASTING_MASK, Z_COPIED
    uint64_t Z_SUPERBLOCK_MEM_LIMIT, Z_SUPERBLOCK_MEM_USED_MAX, Z_SUPERBLOCK_HUGE_PAGES_SINCE
    uint64_t Z_SUPERBLOCK_FAILED_READS, Z_SUPERBLOCK_FAILED_WRITES, Z_SUPERBLOCK_NOTIFY_FREE
    uint64_t Z_SUPERBLOCK_READS, Z_SUPERBLOCK_READ_SECTORS, Z_SUPERBLOCK_WRITES, Z_SUPERBLOCK_WRITE_SECTORS
    uint64_t Z_REQUEST_RECORD_ERRORS, Z_REQUEST_RECORD_BYTES, Z_REQUEST_RECORD_NANOSECONDS, Z_REQUEST_RECORD_BUCKETS
    uint64_t Z_REQUEST_RECORD_END, Z_REQUESTS_IN_FLIGHT
    uint64_t Z_LATENCY_SHIFT, Z_MAX_LATENCY_SHIFT, Z_LATENCY_STEP_SHIFT, Z_LATENCY_BUCKETS
    uint64_t Z_SIMPLE_REPLY_MAGIC, Z_CHUNK_MAGIC, Z_EXTENDED_CHUNK_MAGIC
    uint64_t Z_CHUNK_DONE
    uint64_t Z_COMMAND_READ, Z_COMMAND_WRITE, Z_COMMAND_FLUSH, Z_COMMAND_TRIM
    uint64_t Z_COMMAND_FLAG_FUA, Z_COMMAND_FLAG_PAYLOAD_LEN
    uint64_t Z_CHUNK_NONE, Z_CHUNK_OFFSET_DATA, Z_CHUNK_OFFSET_HOLE, Z_CHUNK_ERROR
    uint64_t Z_ERROR_EIO, Z_ERROR_ENOSPC

cdef extern from *:
    """
    #include <time.h>
    /* What stands before it in the program is in memory before the entry, and what stands behind it is not: a process
       that is killed leaves its stores in this order. */
    static inline void store_entry(uint64_t *entry, uint64_t value) {
        __atomic_store_n(entry, value, __ATOMIC_RELEASE);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    }
    static inline uint32_t uptime(void) {
        struct timespec now;
        clock_gettime(CLOCK_BOOTTIME, &now);
        return (uint32_t)now.tv_sec;
    }
    static inline unsigned codec_number(uint64_t entry) {
        return (entry >> Z_ENTRY_PRIORITY_SHIFT & Z_ENTRY_PRIORITY_MASK) + (entry & Z_ENTRY_ALTERNATE ? Z_PRIORITIES : 0);
    }
    static inline unsigned highest_bit(uint64_t bits) { return 63 - __builtin_clzll(bits); }
    static inline uint16_t get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
    static inline uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
    static inline uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
    static inline uint8_t *put16(uint8_t *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v, 2); return p + 2; }
    static inline uint8_t *put32(uint8_t *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); return p + 4; }
    static inline uint8_t *put64(uint8_t *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); return p + 8; }
    """
    void store_entry(uint64_t *entry, uint64_t value) nogil
    uint32_t uptime() nogil
    unsigned codec_number(uint64_t entry) nogil
    unsigned highest_bit(uint64_t bits) nogil
    uint16_t get16(const uint8_t *p) nogil
    uint32_t get32(const uint8_t *p) nogil
    uint64_t get64(const uint8_t *p) nogil
    uint8_t *put16(uint8_t *p, uint16_t v) nogil
    uint8_t *put32(uint8_t *p, uint32_t v) nogil
    uint8_t *put64(uint8_t *p, uint64_t v) nogil

cdef extern from *:
    """
    #define XXH_INLINE_ALL
    #include <xxhash.h>
    """
    uint64_t XXH3_64bits(const void *, size_t) nogil

cdef extern from "<sys/eventfd.h>" nogil:
    ctypedef uint64_t eventfd_t
    int eventfd_write(int, eventfd_t)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)


cdef void *address(object buffer) except NULL:
    """Return where a writable buffer lies. Its owner has to keep it there."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    cdef void *where = view.buf
    PyBuffer_Release(&view)
    return where


cdef class Lock:
    """A lock as threading.Lock, which the compiled loop takes without the interpreter's."""

    cdef pthread_mutex_t mutex

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def acquire(self):
        """Wait for the lock."""
        if pthread_mutex_trylock(&self.mutex):
            with nogil:
                pthread_mutex_lock(&self.mutex)

    def release(self):
        """Let go of the lock."""
        pthread_mutex_unlock(&self.mutex)

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()
