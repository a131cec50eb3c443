"""Codecs: names, levels, and the calls that compress and decompress one page.

A codec makes compressors and decompressors; each of those belongs to one thread (zstandard's contexts are not
thread-safe, and the others keep a scratch buffer). A compressor also belongs to one source buffer, whose address it
knows: finding it out anew would cost a tenth of the compression of a page.
"""

import ctypes
import functools
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

import lz4.block
import zstandard

from zramd.layout import PAGE_SIZE
from zramd.native import Engine, choose
from zramd.native import library_versions as native_versions

Compress = Callable[[int], bytes | bytearray]
"""Compresses the page at an offset in the compressor's source buffer; the result may be longer than the page."""
Decompress = Callable[[memoryview], bytes]
"""Decompresses one page. Raises CodecError if the data are damaged."""


class CodecError(Exception):
    """Compressed data do not decompress to one page."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression algorithm at a level, perhaps with a dictionary.

    Levels: for lz4 the acceleration (1 and below: 1; higher is faster and larger), for lz4hc 1..12, for zstd
    -131072..22; these are the kernel's meanings and defaults.
    """

    name: str
    level: int
    dictionary: bytes
    compressor: Callable[[bytearray], Compress]
    decompressor: Callable[[], Decompress]

    @property
    def key(self) -> tuple[str, int, bytes]:
        """What makes two codecs the same."""
        return self.name, self.level, self.dictionary

    @property
    def format(self) -> tuple[str, bytes]:
        """What a page is decompressed by: the level says nothing about it."""
        return self.name, self.dictionary


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


def _lz4_compressor(source: bytearray, acceleration: int, dictionary: bytes) -> Compress:
    one_shot = _one_shot()
    # With a dictionary the kernel too loads it anew for each page and makes a streaming call (Linux 6.18).
    if one_shot is None or dictionary:
        return _package_compressor(source, mode="fast", acceleration=acceleration, dict=dictionary)
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


def _lz4_decompressor(dictionary: bytes) -> Decompress:
    decompress, failure = lz4.block.decompress, lz4.block.LZ4BlockError
    if dictionary:
        decompress = functools.partial(decompress, dict=dictionary)

    def decompress_page(data: memoryview) -> bytes:
        try:
            page: bytes = decompress(data, PAGE_SIZE)
        except failure as error:
            raise CodecError(str(error)) from error
        if len(page) != PAGE_SIZE:
            raise CodecError(f"{len(page)} bytes came out instead of {PAGE_SIZE}")
        return page

    return decompress_page


def _zstd_parameters(level: int, dictionary: bytes) -> zstandard.ZstdCompressionParameters:
    # As the kernel: parameters for a source of one page, content size in the frame, no checksum.
    return zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=PAGE_SIZE,
        dict_size=len(dictionary),
        write_content_size=True,
        write_checksum=False,
    )


def _zstd_compressor(
    source: bytearray,
    parameters: zstandard.ZstdCompressionParameters,
    dictionary: zstandard.ZstdCompressionDict | None,
) -> Compress:
    compress = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress
    view = memoryview(source)
    return lambda offset: compress(view[offset : offset + PAGE_SIZE])


def _zstd_decompressor(dictionary: zstandard.ZstdCompressionDict | None) -> Decompress:
    decompress = zstandard.ZstdDecompressor(dict_data=dictionary).decompress

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
MAX_LZ4_DICTIONARY = 64 << 10
"""Bytes that lz4 can look back."""
MAX_DICTIONARY = 1 << 20
"""Bytes of a dictionary for pages of 4 KiB: far more than is of use."""
_DEFAULT_LEVELS = {"lz4": 1, "lz4hc": 9, "zstd": 3}


def codec(name: str, level: int | None = None, dictionary: bytes = b"") -> Codec:
    """Return a codec by name, at a level or at the kernel's default, that has compressed a page and got it back.

    Raises:
        ValueError: no such codec, the level is out of its range, or the dictionary is not fit for it.
    """
    if name not in NAMES:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(NAMES)}")
    chosen = _DEFAULT_LEVELS[name] if level is None else level
    if name == "zstd":
        made = _zstd(chosen, dictionary)
    else:
        if len(dictionary) > MAX_LZ4_DICTIONARY:
            raise ValueError(f"a dictionary for {name} has at most {MAX_LZ4_DICTIONARY} bytes, not {len(dictionary)}")
        made = _lz4(max(1, chosen), dictionary) if name == "lz4" else _lz4hc(chosen, dictionary)
    if dictionary:
        _try_out(made)
    return made


def _lz4(level: int, dictionary: bytes) -> Codec:
    if level > MAX_ACCELERATION:
        raise ValueError(f"lz4 has levels 1 to {MAX_ACCELERATION}, not {level}")
    return Codec(
        "lz4",
        level,
        dictionary,
        lambda source: _lz4_compressor(source, level, dictionary),
        lambda: _lz4_decompressor(dictionary),
    )


def _lz4hc(level: int, dictionary: bytes) -> Codec:
    if not 1 <= level <= 12:
        raise ValueError(f"lz4hc has levels 1 to 12, not {level}")
    options = {"mode": "high_compression", "compression": level, "dict": dictionary}
    return Codec(
        "lz4hc",
        level,
        dictionary,
        lambda source: _package_compressor(source, **options),
        lambda: _lz4_decompressor(dictionary),
    )


def _zstd(level: int, dictionary: bytes) -> Codec:
    if not -131072 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
        raise ValueError(f"zstd has levels -131072 to {zstandard.MAX_COMPRESSION_LEVEL}, not {level}")
    parameters = _zstd_parameters(level, dictionary)
    data = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    if data:
        try:
            # Once; or it would be digested anew for each page.
            data.precompute_compress(compression_params=parameters)
        except zstandard.ZstdError as error:
            raise ValueError(f"the dictionary is damaged: {error}") from error
    return Codec(
        "zstd",
        level,
        dictionary,
        lambda source: _zstd_compressor(source, parameters, data),
        lambda: _zstd_decompressor(data),
    )


def _try_out(made: Codec) -> None:
    """Compress a page and get it back: a library finds out only then that a dictionary is damaged."""
    page = bytearray(made.dictionary[:PAGE_SIZE].ljust(PAGE_SIZE, b"z"))
    try:
        stored = made.compressor(page)(0)
        whole = made.decompressor()(memoryview(stored)) == page
    except (CodecError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise ValueError(f"the dictionary is damaged: {error}") from error
    if not whole:
        raise ValueError("the dictionary is damaged: a page did not come back")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What may be set for an algorithm (algorithm_params); None and b"" are unset."""

    level: int | None = None
    dictionary: bytes = b""


_WORD = re.compile(r'\s*([^\s=]+)(?:=("[^"]*"|\S*))?')


def split_words(text: str) -> dict[str, str]:
    """Split `key=value key="a value"`, as the kernel's next_arg does.

    Raises:
        ValueError: a key has no value.
    """
    words = {}
    for key, value in _WORD.findall(text):
        if not value:
            raise ValueError(f"{key} has no value: write {key}=VALUE")
        words[key] = value.strip('"')
    return words


def parse_parameters(words: dict[str, str]) -> Parameters:
    """Read `level` and `dict`, a path that is read at once. Other words are ignored, as the kernel ignores them.

    Raises:
        ValueError: the level is no number, or the dictionary cannot be used.
        OSError: the dictionary cannot be read.
    """
    level = None
    if "level" in words:
        if not re.fullmatch("[+-]?[0-9]+", words["level"], re.ASCII):
            raise ValueError(f"level={words['level']} is not a number")
        level = int(words["level"])
    return Parameters(level, _read_dictionary(words["dict"]) if "dict" in words else b"")


def _read_dictionary(path: str) -> bytes:
    if not os.path.isabs(path):
        raise ValueError(f"dict={path} must be an absolute path: the server may run in another directory")
    # Nobody waits for the other end of a pipe here.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is not a regular file")
        data = file.read(MAX_DICTIONARY + 1)
    if not 0 < len(data) <= MAX_DICTIONARY:
        raise ValueError(f"{path} is empty or has more than {MAX_DICTIONARY} bytes: it is no dictionary for pages")
    return data


_CHOICE = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def parse_codec(text: str) -> Codec:
    """Return the codec that `text` names, as zram-generator writes it: `lz4`, `zstd(level=9)`, `lz4(dict=/a,level=2)`.

    Raises:
        ValueError: it names none, or its dictionary cannot be used.
    """
    match = _CHOICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an algorithm: write a name, or a name and a level as in 'zstd(level=9)'")
    try:
        words = split_words(re.sub(r"\s*=\s*", "=", (match[2] or "").replace(",", " ")))
    except ValueError as error:
        raise ValueError(f"{text!r} is not an algorithm: {error}") from error
    if unknown := words.keys() - {"level", "dict"}:
        raise ValueError(f"{text!r} is not an algorithm: it can have level= and dict=, not {', '.join(unknown)}")
    try:
        parameters = parse_parameters(words)
    except OSError as error:
        raise ValueError(f"cannot read the dictionary {words['dict']}: {error.strerror}") from error
    return codec(match[1], parameters.level, parameters.dictionary)


def lz4_implementation() -> str:
    """Say which call compresses for lz4: `one-shot` (the kernel's) or `streaming`."""
    return "one-shot" if choose() is Engine.NATIVE or _one_shot() else "streaming"


def library_versions() -> tuple[str, str]:
    """Return the versions of liblz4 and libzstd in use."""
    if choose() is Engine.NATIVE:
        return native_versions()
    return lz4.library_version_string(), ".".join(map(str, zstandard.ZSTD_VERSION))


def describe(chosen: str) -> str:
    """Return a line for each codec, the chosen one in brackets: its library, and the call that compresses a page."""
    one_shot = lz4_implementation() == "one-shot"
    call = "LZ4_compress_fast, one-shot as the kernel's" if one_shot else "LZ4_compress_fast_continue, streaming"
    lz4_version, zstd_version = library_versions()
    if choose() is Engine.NATIVE:
        lz4_version, zstd_version = f"{lz4_version} of the system", f"{zstd_version} of the system"
    else:
        lz4_version += f" in the package lz4 {lz4.__version__}"
        zstd_version += f" in the package zstandard {zstandard.__version__}"
    lines = {
        "lz4": f"liblz4 {lz4_version}: {call}",
        "lz4hc": f"liblz4 {lz4_version}: LZ4_compress_HC",
        "zstd": f"libzstd {zstd_version}",
    }
    return "".join(f"{f'[{name}]' if name == chosen else name:<8}{lines[name]}\n" for name in NAMES)
