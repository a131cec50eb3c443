"""Compression of one page with the system's libraries, by the same calls and parameters as zramd/device/codecs.py."""

cdef extern from "<lz4.h>" nogil:
    ctypedef struct LZ4_stream_t:
        pass
    const char *LZ4_versionString()
    int LZ4_compressBound(int)
    LZ4_stream_t *LZ4_createStream()
    int LZ4_freeStream(LZ4_stream_t *)
    int LZ4_compress_fast_extState(void *, const char *, char *, int, int, int)
    int LZ4_loadDict(LZ4_stream_t *, const char *, int)
    int LZ4_compress_fast_continue(LZ4_stream_t *, const char *, char *, int, int, int)
    int LZ4_decompress_safe(const char *, char *, int, int)
    int LZ4_decompress_safe_usingDict(const char *, char *, int, int, const char *, int)

cdef extern from "<lz4hc.h>" nogil:
    ctypedef struct LZ4_streamHC_t:
        pass
    LZ4_streamHC_t *LZ4_createStreamHC()
    int LZ4_freeStreamHC(LZ4_streamHC_t *)
    int LZ4_compress_HC_extStateHC(void *, const char *, char *, int, int, int)
    void LZ4_resetStreamHC_fast(LZ4_streamHC_t *, int)
    int LZ4_loadDictHC(LZ4_streamHC_t *, const char *, int)
    int LZ4_compress_HC_continue(LZ4_streamHC_t *, const char *, char *, int, int)

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    ctypedef enum ZSTD_cParameter:
        ZSTD_c_compressionLevel, ZSTD_c_windowLog, ZSTD_c_hashLog, ZSTD_c_chainLog, ZSTD_c_searchLog, ZSTD_c_minMatch
        ZSTD_c_targetLength, ZSTD_c_strategy, ZSTD_c_dictIDFlag
    const char *ZSTD_versionString()
    size_t ZSTD_compressBound(size_t)
    unsigned ZSTD_isError(size_t)
    ZSTD_CCtx *ZSTD_createCCtx()
    size_t ZSTD_freeCCtx(ZSTD_CCtx *)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx *, ZSTD_cParameter, int)
    size_t ZSTD_compress2(ZSTD_CCtx *, void *, size_t, const void *, size_t)
    ZSTD_DCtx *ZSTD_createDCtx()
    size_t ZSTD_freeDCtx(ZSTD_DCtx *)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx *, void *, size_t, const void *, size_t)

cdef extern from *:
    """
    #define ZSTD_STATIC_LINKING_ONLY
    #include <zstd.h>
    """
    ctypedef struct ZSTD_compressionParameters:
        unsigned windowLog, chainLog, hashLog, searchLog, minMatch, targetLength
        int strategy
    ZSTD_compressionParameters ZSTD_getCParams(int, unsigned long long, size_t) nogil
    size_t ZSTD_CCtx_loadDictionary_byReference(ZSTD_CCtx *, const void *, size_t) nogil
    size_t ZSTD_DCtx_loadDictionary_byReference(ZSTD_DCtx *, const void *, size_t) nogil

cdef enum Algorithm:
    LZ4, LZ4HC, ZSTD

cdef dict _ALGORITHMS = {"lz4": LZ4, "lz4hc": LZ4HC, "zstd": ZSTD}


def lz4_version():
    """Return the version of liblz4."""
    return LZ4_versionString().decode()


def zstd_version():
    """Return the version of libzstd."""
    return ZSTD_versionString().decode()


cdef class Codec:
    """The contexts with which one thread compresses and decompresses pages. Built from a codec of the Python engine.

    `bound` is the most bytes that a page may become.
    """

    cdef Algorithm algorithm
    cdef int level
    cdef bytes dictionary
    cdef const char *dictionary_start
    cdef int dictionary_bytes
    cdef LZ4_stream_t *lz4
    cdef LZ4_streamHC_t *lz4hc
    cdef ZSTD_CCtx *compressor
    cdef ZSTD_DCtx *decompressor
    cdef int bound

    def __cinit__(self, codec):
        self.algorithm = _ALGORITHMS[codec.name]
        self.level = codec.level
        self.dictionary = codec.dictionary
        self.dictionary_start = self.dictionary
        self.dictionary_bytes = len(self.dictionary)
        self.bound = max(LZ4_compressBound(Z_PAGE_SIZE), ZSTD_compressBound(Z_PAGE_SIZE))
        if self.algorithm == LZ4:
            self.lz4 = LZ4_createStream()
        elif self.algorithm == LZ4HC:
            self.lz4hc = LZ4_createStreamHC()
        else:
            self._make_zstd()
        if self.lz4 == NULL and self.lz4hc == NULL and (self.compressor == NULL or self.decompressor == NULL):
            raise MemoryError

    def _make_zstd(self):
        self.compressor = ZSTD_createCCtx()
        self.decompressor = ZSTD_createDCtx()
        if self.compressor == NULL or self.decompressor == NULL:
            return
        cdef ZSTD_compressionParameters chosen = ZSTD_getCParams(self.level, Z_PAGE_SIZE, self.dictionary_bytes)
        for parameter, value in (
            (ZSTD_c_compressionLevel, self.level),
            (ZSTD_c_windowLog, chosen.windowLog),
            (ZSTD_c_hashLog, chosen.hashLog),
            (ZSTD_c_chainLog, chosen.chainLog),
            (ZSTD_c_searchLog, chosen.searchLog),
            (ZSTD_c_minMatch, chosen.minMatch),
            (ZSTD_c_targetLength, chosen.targetLength),
            (ZSTD_c_strategy, chosen.strategy),
            (ZSTD_c_dictIDFlag, 0),
        ):
            if ZSTD_isError(ZSTD_CCtx_setParameter(self.compressor, parameter, value)):
                raise ValueError(f"libzstd does not take level {self.level}")
        cdef const char *start = self.dictionary_start
        cdef size_t size = self.dictionary_bytes
        if size and (
            ZSTD_isError(ZSTD_CCtx_loadDictionary_byReference(self.compressor, start, size))
            or ZSTD_isError(ZSTD_DCtx_loadDictionary_byReference(self.decompressor, start, size))
        ):
            raise ValueError("the dictionary is damaged")

    def __dealloc__(self):
        LZ4_freeStream(self.lz4)
        LZ4_freeStreamHC(self.lz4hc)
        ZSTD_freeCCtx(self.compressor)
        ZSTD_freeDCtx(self.decompressor)

    def compress_page(self, page):
        """Return a page (in a writable buffer) compressed."""
        cdef const uint8_t *source = <const uint8_t *>address(page)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.bound)
        return out[: self.compress(source, <uint8_t *><char *>out)]

    cdef uint32_t compress(self, const uint8_t *page, uint8_t *target) noexcept nogil:
        """Compress a page to at most `bound` bytes. Return how many, or a page's bytes if the library failed."""
        cdef const char *source = <const char *>page
        cdef char *out = <char *>target
        cdef size_t size
        cdef int count
        if self.algorithm == ZSTD:
            size = ZSTD_compress2(self.compressor, target, self.bound, page, Z_PAGE_SIZE)
            return Z_PAGE_SIZE if ZSTD_isError(size) else <uint32_t>size
        if self.algorithm == LZ4:
            if self.dictionary_bytes:
                LZ4_loadDict(self.lz4, self.dictionary_start, self.dictionary_bytes)
                count = LZ4_compress_fast_continue(self.lz4, source, out, Z_PAGE_SIZE, self.bound, self.level)
            else:
                count = LZ4_compress_fast_extState(self.lz4, source, out, Z_PAGE_SIZE, self.bound, self.level)
        elif self.dictionary_bytes:
            LZ4_resetStreamHC_fast(self.lz4hc, self.level)
            LZ4_loadDictHC(self.lz4hc, self.dictionary_start, self.dictionary_bytes)
            count = LZ4_compress_HC_continue(self.lz4hc, source, out, Z_PAGE_SIZE, self.bound)
        else:
            count = LZ4_compress_HC_extStateHC(self.lz4hc, source, out, Z_PAGE_SIZE, self.bound, self.level)
        return count if count > 0 else Z_PAGE_SIZE

    cdef bint decompress(self, const uint8_t *data, uint32_t length, uint8_t *page) noexcept nogil:
        """Say whether data decompress to one page, which is then at `page`."""
        cdef const char *source = <const char *>data
        cdef char *out = <char *>page
        cdef int count
        if self.algorithm == ZSTD:
            return ZSTD_decompressDCtx(self.decompressor, page, Z_PAGE_SIZE, data, length) == Z_PAGE_SIZE
        if self.dictionary_bytes:
            count = LZ4_decompress_safe_usingDict(
                source, out, length, Z_PAGE_SIZE, self.dictionary_start, self.dictionary_bytes
            )
        else:
            count = LZ4_decompress_safe(source, out, length, Z_PAGE_SIZE)
        return count == <int>Z_PAGE_SIZE
