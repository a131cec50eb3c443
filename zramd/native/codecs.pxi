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


cdef struct CodecState:
    # The contexts with which one thread compresses and decompresses pages; `bound`: the most bytes that one may become.
    Algorithm algorithm
    int level
    const char *dictionary
    int dictionary_bytes
    LZ4_stream_t *lz4
    LZ4_streamHC_t *lz4hc
    ZSTD_CCtx *compressor
    ZSTD_DCtx *decompressor
    int bound


cdef class Codec:
    """The state of a codec for one thread. Built from a codec of the Python engine; it may be only for decompressing."""

    cdef CodecState state
    cdef bytes dictionary

    def __cinit__(self, codec, bint compressing=True):
        cdef CodecState *state = &self.state
        state.algorithm = _ALGORITHMS[codec.name]
        state.level = codec.level
        self.dictionary = codec.dictionary
        state.dictionary = self.dictionary
        state.dictionary_bytes = len(self.dictionary)
        state.bound = max(LZ4_compressBound(Z_PAGE_SIZE), ZSTD_compressBound(Z_PAGE_SIZE))
        if state.algorithm == ZSTD:
            self._make_decompressor()
        if not compressing:
            return
        if state.algorithm == LZ4:
            state.lz4 = LZ4_createStream()
        elif state.algorithm == LZ4HC:
            state.lz4hc = LZ4_createStreamHC()
        else:
            self._make_compressor()
        if state.lz4 == NULL and state.lz4hc == NULL and state.compressor == NULL:
            raise MemoryError

    def _make_decompressor(self):
        cdef CodecState *state = &self.state
        state.decompressor = ZSTD_createDCtx()
        if state.decompressor == NULL:
            raise MemoryError
        if state.dictionary_bytes and ZSTD_isError(
            ZSTD_DCtx_loadDictionary_byReference(state.decompressor, state.dictionary, state.dictionary_bytes)
        ):
            raise ValueError("the dictionary is damaged")

    def _make_compressor(self):
        cdef CodecState *state = &self.state
        state.compressor = ZSTD_createCCtx()
        if state.compressor == NULL:
            return
        cdef ZSTD_compressionParameters chosen = ZSTD_getCParams(state.level, Z_PAGE_SIZE, state.dictionary_bytes)
        for parameter, value in (
            (ZSTD_c_compressionLevel, state.level),
            (ZSTD_c_windowLog, chosen.windowLog),
            (ZSTD_c_hashLog, chosen.hashLog),
            (ZSTD_c_chainLog, chosen.chainLog),
            (ZSTD_c_searchLog, chosen.searchLog),
            (ZSTD_c_minMatch, chosen.minMatch),
            (ZSTD_c_targetLength, chosen.targetLength),
            (ZSTD_c_strategy, chosen.strategy),
            (ZSTD_c_dictIDFlag, 0),
        ):
            if ZSTD_isError(ZSTD_CCtx_setParameter(state.compressor, parameter, value)):
                raise ValueError(f"libzstd does not take level {state.level}")
        if state.dictionary_bytes and ZSTD_isError(
            ZSTD_CCtx_loadDictionary_byReference(state.compressor, state.dictionary, state.dictionary_bytes)
        ):
            raise ValueError("the dictionary is damaged")

    def __dealloc__(self):
        LZ4_freeStream(self.state.lz4)
        LZ4_freeStreamHC(self.state.lz4hc)
        ZSTD_freeCCtx(self.state.compressor)
        ZSTD_freeDCtx(self.state.decompressor)

    def compress_page(self, page):
        """Return a page (in a writable buffer) compressed."""
        cdef const uint8_t *source = <const uint8_t *>address(page)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.state.bound)
        cdef uint8_t *target = <uint8_t *><char *>out
        cdef uint32_t size
        with nogil:
            size = compress(&self.state, source, target)
        return out[:size]


cdef uint32_t compress(CodecState *codec, const uint8_t *page, uint8_t *target) noexcept nogil:
    """Compress a page to at most `bound` bytes. Return how many, or a page's bytes if the library failed."""
    cdef const char *source = <const char *>page
    cdef char *out = <char *>target
    cdef size_t size
    cdef int count
    if codec.algorithm == ZSTD:
        size = ZSTD_compress2(codec.compressor, target, codec.bound, page, Z_PAGE_SIZE)
        return Z_PAGE_SIZE if ZSTD_isError(size) else <uint32_t>size
    if codec.algorithm == LZ4:
        if codec.dictionary_bytes:
            LZ4_loadDict(codec.lz4, codec.dictionary, codec.dictionary_bytes)
            count = LZ4_compress_fast_continue(codec.lz4, source, out, Z_PAGE_SIZE, codec.bound, codec.level)
        else:
            count = LZ4_compress_fast_extState(codec.lz4, source, out, Z_PAGE_SIZE, codec.bound, codec.level)
    elif codec.dictionary_bytes:
        LZ4_resetStreamHC_fast(codec.lz4hc, codec.level)
        LZ4_loadDictHC(codec.lz4hc, codec.dictionary, codec.dictionary_bytes)
        count = LZ4_compress_HC_continue(codec.lz4hc, source, out, Z_PAGE_SIZE, codec.bound)
    else:
        count = LZ4_compress_HC_extStateHC(codec.lz4hc, source, out, Z_PAGE_SIZE, codec.bound, codec.level)
    return count if count > 0 else Z_PAGE_SIZE


cdef bint decompress(CodecState *codec, const uint8_t *data, uint32_t length, uint8_t *page) noexcept nogil:
    """Say whether data decompress to one page, which is then at `page`."""
    cdef const char *source = <const char *>data
    cdef char *out = <char *>page
    cdef int count
    if codec.algorithm == ZSTD:
        return ZSTD_decompressDCtx(codec.decompressor, page, Z_PAGE_SIZE, data, length) == Z_PAGE_SIZE
    if codec.dictionary_bytes:
        count = LZ4_decompress_safe_usingDict(
            source, out, length, Z_PAGE_SIZE, codec.dictionary, codec.dictionary_bytes
        )
    else:
        count = LZ4_decompress_safe(source, out, length, Z_PAGE_SIZE)
    return count == <int>Z_PAGE_SIZE
