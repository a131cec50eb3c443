"""Codecs: names, levels, and the calls that compress and decompress one page.

A codec makes compressors and decompressors; each of those belongs to one thread (zstandard's contexts are not
thread-safe, and the others keep a scratch buffer). A compressor also belongs to one source buffer, whose address it
knows: finding it out anew would cost a tenth of the compression of a page.
"""

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import lz4.block
import zstandard

from zramd.layout import PAGE_SIZE

Compress = Callable[[int], bytes | bytearray]
"""Compresses the page at an offset in the compressor's source buffer; the result may be longer than the page."""
Decompress = Callable[[memoryview], bytes]
"""Decompresses one page. Raises CodecError if the data are damaged."""


class CodecError(Exception):
    """Compressed data do not decompress to one page."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression algorithm at a level.

    Levels: for lz4 the acceleration (1 and below: 1; higher is faster and larger), for lz4hc 1..12, for zstd
    -131072..22; these are the kernel's meanings and defaults.
    """

    name: str
    level: int
    compressor: Callable[[bytearray], Compress]
    decompressor: Callable[[], Decompress]


@functools.cache
def _one_shot() -> Callable[..., int] | None:
    """Return LZ4_compress_fast of the library inside the lz4 package, or None if it does not export it.

    It is what the kernel's lz4 calls. lz4.block.compress makes a streaming call instead, whose output for a 4 KiB page
    is 1% larger on average and differs from the kernel's on four pages of five.
    """
    try:
        function = ctypes.CDLL(lz4.block._block.__file__).LZ4_compress_fast
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_int
    call: Callable[..., int] = function
    return call


def _lz4_compressor(source: bytearray, acceleration: int) -> Compress:
    one_shot = _one_shot()
    if one_shot is None:
        return _package_compressor(source, mode="fast", acceleration=acceleration)
    compress, byref = one_shot, ctypes.byref
    bound = PAGE_SIZE + PAGE_SIZE // 255 + 16  # LZ4_compressBound
    pages = (ctypes.c_char * len(source)).from_buffer(source)
    scratch = bytearray(bound)
    target = (ctypes.c_char * bound).from_buffer(scratch)
    return lambda offset: scratch[: compress(byref(pages, offset), target, PAGE_SIZE, bound, acceleration)]


def _package_compressor(source: bytearray, **options: object) -> Compress:
    view = memoryview(source)

    def compress_page(offset: int) -> bytes:
        data: bytes = lz4.block.compress(view[offset : offset + PAGE_SIZE], store_size=False, **options)
        return data

    return compress_page


def _lz4_decompressor() -> Decompress:
    decompress, failure = lz4.block.decompress, lz4.block.LZ4BlockError

    def decompress_page(data: memoryview) -> bytes:
        try:
            page: bytes = decompress(data, PAGE_SIZE)
        except failure as error:
            raise CodecError(str(error)) from error
        if len(page) != PAGE_SIZE:
            raise CodecError(f"{len(page)} bytes came out instead of {PAGE_SIZE}")
        return page

    return decompress_page


def _zstd_compressor(source: bytearray, level: int) -> Compress:
    # As the kernel: parameters for a source of one page, content size in the frame, no checksum.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=PAGE_SIZE, write_content_size=True, write_checksum=False
    )
    compress = zstandard.ZstdCompressor(compression_params=parameters).compress
    view = memoryview(source)
    return lambda offset: compress(view[offset : offset + PAGE_SIZE])


def _zstd_decompressor() -> Decompress:
    decompress = zstandard.ZstdDecompressor().decompress

    def decompress_page(data: memoryview) -> bytes:
        try:
            page = decompress(data, max_output_size=PAGE_SIZE)
        except zstandard.ZstdError as error:
            raise CodecError(str(error)) from error
        if len(page) != PAGE_SIZE:
            raise CodecError(f"{len(page)} bytes came out instead of {PAGE_SIZE}")
        return page

    return decompress_page


NAMES = ("lz4", "lz4hc", "zstd")
"""In the order in which the kernel lists them."""

MAX_ACCELERATION = 65537
"""liblz4's LZ4_ACCELERATION_MAX."""
_DEFAULT_LEVELS = {"lz4": 1, "lz4hc": 9, "zstd": 3}


def codec(name: str, level: int | None = None) -> Codec:
    """Return a codec by name, at a level or at the kernel's default.

    Raises:
        ValueError: no such codec, or the level is out of its range.
    """
    if name not in NAMES:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(NAMES)}")
    chosen = _DEFAULT_LEVELS[name] if level is None else level
    if name == "lz4":
        chosen = max(1, chosen)
        if chosen > MAX_ACCELERATION:
            raise ValueError(f"lz4 has levels 1 to {MAX_ACCELERATION}, not {chosen}")
        return Codec(name, chosen, lambda source: _lz4_compressor(source, chosen), _lz4_decompressor)
    if name == "lz4hc":
        if not 1 <= chosen <= 12:
            raise ValueError(f"lz4hc has levels 1 to 12, not {chosen}")
        options = {"mode": "high_compression", "compression": chosen}
        return Codec(name, chosen, lambda source: _package_compressor(source, **options), _lz4_decompressor)
    if not -131072 <= chosen <= zstandard.MAX_COMPRESSION_LEVEL:
        raise ValueError(f"zstd has levels -131072 to {zstandard.MAX_COMPRESSION_LEVEL}, not {chosen}")
    return Codec(name, chosen, lambda source: _zstd_compressor(source, chosen), _zstd_decompressor)


_CHOICE = re.compile(r"\s*(\w+)\s*(?:\(\s*level\s*=\s*(-?\d+)\s*\))?\s*")


def parse_codec(text: str) -> Codec:
    """Return the codec that `text` names, as zram-generator writes it: `lz4`, `zstd(level=9)`.

    Raises:
        ValueError: it names none.
    """
    match = _CHOICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an algorithm: write a name, or a name and a level as in 'zstd(level=9)'")
    return codec(match[1], None if match[2] is None else int(match[2]))


def lz4_implementation() -> str:
    """Say which call compresses for lz4: `one-shot` (the kernel's) or `streaming`."""
    return "one-shot" if _one_shot() else "streaming"
