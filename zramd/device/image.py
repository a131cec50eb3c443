"""The format of a saved disk: an image has its pages as they are stored, compressed.

    header, chunk, chunk, ..., trailer; nothing behind it. All numbers are little-endian.

header                                        chunk

     0        8         12        16               0         4         8          16
    +--------+---------+---------+                +---------+---------+----------+------------+
    | magic  | version | length  |                | "CHNK"  | runs    | number   | bytes of   |
    +--------+---------+---------+                |         |         |          | its data   |
    | 16  disksize, bytes        |                +---------+---------+----------+------------+
    | 24  UUID, 16 bytes         |                | 24  checksum of all the rest of it        |
    | 40  seconds since 1970     |                | 32  runs, 8 bytes each                    |
    | 48  pages stored           |                |     data of all its pages, in their order |
    +------+------+------+-------+                +-------------------------------------------+
    | 56   | 60   | 64   | 68    |
    |chain | fit  |feat- |alter- |               trailer
    |size  | rule |ures  |nates  |
    +------+------+------+-------+                 0         4      8
    | 72  codecs, 8 times 32     |                +---------+------+--------------------------+
    | 328 their dictionaries     |                | "TAIL"  | 0    | chunks                   |
    |     checksum of the header |                +---------+------+--------------------------+
    +----------------------------+                | 16  pages stored, 24 same-filled, 32 huge |
                                                  | 40  bytes of their objects                |
                                                  | 48  checksum of the whole file until here,|
                                                  |     XXH3 of 16 bytes                      |
                                                  +-------------------------------------------+

codec:   name, 16 bytes, filled up with zeros (only zeros: there is none of this number); level, 8 bytes, signed; bytes
         of its dictionary, 4; 0, 4

run:     63      40 39     0   pages that follow each other and have the same entry, but for what they hold. The bits
        +----------+--------+  from 40 on are those of a page-table entry (zramd/layout.py), but for the size: that of
        |  entry   | pages  |  a same-filled page is 8 if its pattern is not 0. Each page has so many bytes of the data.
        +----------+--------+  The pages of a chunk begin with 512 times its number; those behind its last run are
                               empty, and a chunk of empty pages is left out. The chunks are in order.

Checksums of header and chunks are XXH3, 8 bytes. A reader refuses what it does not know: another version, features that
have a bit set besides INTEGRITY. Features are those of the superblock; so are rule, alternates and numbers of codecs.
"""

import struct
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from xxhash import xxh3_64_digest

from zramd.device.algorithms import PRIMARY, Algorithms
from zramd.device.codecs import MAX_DICTIONARY, Codec, codec
from zramd.device.snapshot import CHUNK_PAGES
from zramd.layout import CODECS, ENTRY_HANDLE_MASK, INTEGRITY, PAGE_SIZE, WORD
from zramd.zsmalloc import FitRule

MAGIC = b"zramdIMG"
VERSION = 1
CHUNK, TRAILER = b"CHNK", b"TAIL"
CHECKSUM_BYTES = 8
WHOLE_CHECKSUM_BYTES = 16

_START = struct.Struct("<8sII")
_HEADER = struct.Struct("<8sIIQ16sQQIIII")
_CODEC = struct.Struct("<16sqII")
_CHUNK = struct.Struct("<4sIQQ")
_TRAILER = struct.Struct("<4sIQQQQQ")
_HEADER_BYTES = _HEADER.size + CODECS * _CODEC.size + CHECKSUM_BYTES
"""Without dictionaries."""

Take = Callable[[int], bytes]
"""Returns so many of the bytes that follow; raises ImageError if there are fewer."""


class ImageError(ValueError):
    """What is read is no image, or is damaged, or cannot be used here; the text is one line."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a disk was when it was saved. `disksize` is in bytes, `seconds` since 1970; `pages` are stored."""

    disksize: int
    uuid: uuid.UUID
    seconds: int
    pages: int
    chain_size: int
    rule: FitRule
    integrity: bool
    algorithms: Algorithms


@dataclass(slots=True)
class Counts:
    """What an image holds: chunks, pages that are not empty, those that are same-filled or huge, bytes of objects."""

    chunks: int = 0
    pages: int = 0
    same: int = 0
    huge: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Runs as (entry, pages) from page `first` on, and the data of their pages."""

    first: int
    runs: list[tuple[int, int]]
    data: memoryview


def pack_header(header: Header) -> bytes:
    """Return the bytes of a header."""
    codecs = [_pack_codec(chosen) for chosen in header.algorithms.codecs]
    dictionaries = b"".join(chosen.dictionary for chosen in header.algorithms.codecs if chosen)
    fixed = _HEADER.pack(
        MAGIC,
        VERSION,
        _HEADER_BYTES + len(dictionaries),
        header.disksize,
        header.uuid.bytes,
        header.seconds,
        header.pages,
        header.chain_size,
        header.rule,
        INTEGRITY * header.integrity,
        header.algorithms.alternates,
    )
    packed = b"".join((fixed, *codecs, dictionaries))
    return packed + xxh3_64_digest(packed)


def _pack_codec(chosen: Codec | None) -> bytes:
    if chosen is None:
        return bytes(_CODEC.size)
    return _CODEC.pack(chosen.name.encode(), chosen.level, len(chosen.dictionary), 0)


def take_header(take: Take) -> Header:
    """Read a header.

    Raises:
        ImageError: it is none, or damaged, or not known here.
    """
    start = take(_START.size)
    magic, version, length = _START.unpack(start)
    if magic != MAGIC:
        raise ImageError("it is not a disk saved by zramd")
    if version != VERSION:
        raise ImageError(f"it is of version {version}, and this zramd knows {VERSION}: use the zramd that saved it")
    if not _HEADER_BYTES <= length <= _HEADER_BYTES + CODECS * MAX_DICTIONARY:
        raise ImageError("its header is damaged")
    packed = start + take(length - _START.size)
    body, checksum = packed[:-CHECKSUM_BYTES], packed[-CHECKSUM_BYTES:]
    if xxh3_64_digest(body) != checksum:
        raise ImageError("its header is damaged")
    *_, disksize, raw, seconds, stored, chain_size, rule, features, alternates = _HEADER.unpack_from(body)
    if features & ~INTEGRITY:
        raise ImageError(f"it has features ({features:#x}) that this zramd does not know: use the zramd that saved it")
    try:
        codecs = list(_unpack_codecs(body))
        algorithms = Algorithms(codecs, alternates)
        if not disksize or disksize % PAGE_SIZE or algorithms.at(PRIMARY) is None:
            raise ValueError("there is no disk")
        integrity = bool(features & INTEGRITY)
        return Header(disksize, uuid.UUID(bytes=raw), seconds, stored, chain_size, FitRule(rule), integrity, algorithms)
    except ValueError as error:
        raise ImageError(f"its header makes no sense: {error}") from error


def _unpack_codecs(body: bytes) -> Iterator[Codec | None]:
    position = _HEADER.size + CODECS * _CODEC.size
    for number in range(CODECS):
        name, level, length, _ = _CODEC.unpack_from(body, _HEADER.size + number * _CODEC.size)
        dictionary = body[position : position + length]
        position += length
        yield codec(name.rstrip(b"\0").decode("ascii"), level, dictionary) if name.strip(b"\0") else None
    if position != len(body):
        raise ValueError("dictionaries are missing")


def pack_chunk(number: int, entries: Sequence[int], data: bytes) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Return the bytes of a chunk, in parts, and its runs; none if all its pages are empty.

    `entries` are those of a snapshot's pages, `data` what they hold.
    """
    runs = [(entry, sum(1 for _ in alike)) for entry, alike in groupby(entries)]
    if runs and not runs[-1][0]:
        runs.pop()
    if not runs:
        return [], []
    packed = array("Q", (entry | pages for entry, pages in runs)).tobytes()
    fixed = _CHUNK.pack(CHUNK, len(runs), number, len(data))
    return [fixed, xxh3_64_digest(b"".join((fixed, packed, data))), packed, data], runs


def take_part(take: Take, pages: int) -> Chunk | Counts:
    """Read a chunk of a disk of so many pages, or the counts of the trailer; its checksum is still to come.

    Raises:
        ImageError: it is damaged.
    """
    start = take(_CHUNK.size)
    kind, count, number, length = _CHUNK.unpack(start)
    if kind == TRAILER:
        _, zero, *counts = _TRAILER.unpack(start + take(_TRAILER.size - _CHUNK.size))
        if zero:
            raise ImageError("its trailer is damaged")
        return Counts(*counts)
    first = number * CHUNK_PAGES
    room = min(CHUNK_PAGES, pages - first)
    # Before any of it is read: these say how much.
    if kind != CHUNK or not 0 < count <= room or length > room * PAGE_SIZE:
        raise ImageError(f"it is damaged behind chunk {number}" if kind == CHUNK else "it is damaged between chunks")
    checksum, packed, data = take(CHECKSUM_BYTES), take(count * WORD), take(length)
    if xxh3_64_digest(b"".join((start, packed, data))) != checksum:
        raise ImageError(f"chunk {number} (pages from {first} on) is damaged")
    words = memoryview(packed).cast("Q").tolist()
    runs = [(word & ~ENTRY_HANDLE_MASK, word & ENTRY_HANDLE_MASK) for word in words]
    if sum(pages for _, pages in runs) > room:
        raise ImageError(f"chunk {number} has more pages than there are")
    return Chunk(first, runs, memoryview(data))


def pack_trailer(counts: Counts) -> bytes:
    """Return the bytes of a trailer without the checksum of the whole."""
    return _TRAILER.pack(TRAILER, 0, counts.chunks, counts.pages, counts.same, counts.huge, counts.bytes)
