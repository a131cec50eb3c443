"""Replies, gathered for one send: simple ones, structured ones (chunks), and chunks with the extended header."""

from itertools import groupby
from typing import NamedTuple

from zramd.device.fetching import Fetched, NotInMemoryError, PageError
from zramd.device.pages import ZERO_PAGE
from zramd.device.zram import Device
from zramd.nbd.block_status import Context, Extent
from zramd.nbd.protocol import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_MAGIC,
    DATA_CHUNK,
    ERROR,
    EXTENDED_CHUNK,
    EXTENDED_CHUNK_MAGIC,
    EXTENDED_DATA_CHUNK,
    EXTENDED_EXTENT,
    EXTENT,
    HOLE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    U32,
    U64,
    Chunk,
    Error,
)

Buffer = bytes | memoryview

_OFFSET_DATA = int(Chunk.OFFSET_DATA)  # an enum member costs more


class Failure(NamedTuple):
    """Why a request failed; only chunks carry the text."""

    number: Error
    text: str


class SimpleReplies:
    """What a client gets that has not asked for more.

    Attributes:
        parts: what is to be sent.
        size: how many bytes that is.
    """

    __slots__ = ("parts", "size")

    fails_late = False
    """Whether a read can still fail after the first part of its reply was sent."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []
        self.size = 0

    def _add(self, part: bytes) -> None:
        self.parts.append(part)
        self.size += len(part)

    def done(self, cookie: int, start: int) -> None:
        """Add the reply to a request, at `start`, that is done and has nothing to return."""
        self.parts.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
        self.size += SIMPLE_REPLY.size

    def fail(self, cookie: int, start: int, failure: Failure, offset: int | None = None) -> None:
        """Add the reply to a request, at `start`, that failed: at `offset`, if that is known."""
        self._add(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, failure.number, cookie))

    def read(
        self,
        device: Device,
        cookie: int,
        start: int,
        length: int,
        offset: int,
        piece: int,
        fetched: dict[int, Fetched],
        whole: bool = False,
    ) -> None:
        """Add `piece` bytes from `offset` of the reply to a read of `length` bytes at `start`.

        A reply is added in one piece or in several, in order; with `whole`, as one piece and at most one chunk. The
        caller holds the device's lock, and has `fetched` what was missing before.

        Raises:
            PageError: a page is damaged; nothing is added.
            NotInMemoryError: pages have to be fetched first; nothing is added.
        """
        position = len(self.parts)
        if offset == start:
            self.parts.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
        try:
            device.read(offset, piece, self.parts, fetched)
        except (PageError, NotInMemoryError):
            del self.parts[position:]
            raise
        self.size += piece + (SIMPLE_REPLY.size if offset == start else 0)

    def status(self, cookie: int, start: int, found: list[tuple[Context, list[Extent]]]) -> None:
        """Add the reply to a BLOCK_STATUS: the extents in each context, from `start` on."""
        raise NotImplementedError


class StructuredReplies(SimpleReplies):
    """What a client gets that asked for structured replies: chunks where there are contents, else simple replies."""

    __slots__ = ()

    fails_late = True

    def _chunk(self, flags: int, kind: Chunk, cookie: int, start: int, length: int) -> bytes:
        return CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, length)

    def _data(self, flags: int, cookie: int, start: int, offset: int, size: int) -> bytes:
        return DATA_CHUNK.pack(CHUNK_MAGIC, flags, _OFFSET_DATA, cookie, U64.size + size, offset)

    def fail(self, cookie: int, start: int, failure: Failure, offset: int | None = None) -> None:
        """Add an error chunk, the last of the reply."""
        text = failure.text.encode()
        payload = ERROR.pack(failure.number, len(text)) + text
        kind = Chunk.ERROR
        if offset is not None:
            kind = Chunk.ERROR_OFFSET
            payload += U64.pack(offset)
        self._add(self._chunk(CHUNK_DONE, kind, cookie, start, len(payload)) + payload)

    def read(
        self,
        device: Device,
        cookie: int,
        start: int,
        length: int,
        offset: int,
        piece: int,
        fetched: dict[int, Fetched],
        whole: bool = False,
    ) -> None:
        """Add data as data and zeros as holes."""
        if not length:
            self._add(self._chunk(CHUNK_DONE, Chunk.NONE, cookie, start, 0))
            return
        pages: list[Buffer] = []
        device.read(offset, piece, pages, fetched)
        if piece == length and len(pages) == 1 and not _is_zero(pages[0]):
            self._add(self._data(CHUNK_DONE, cookie, start, offset, length))
            self.parts += pages
            self.size += length
            return
        in_one = whole and not all(map(_is_zero, pages))
        for is_hole, run in groupby(pages, _is_data if in_one else _is_zero):
            parts = list(run)
            size = sum(map(len, parts))
            flags = CHUNK_DONE if offset + size == start + length else 0
            if is_hole:
                hole = HOLE.pack(offset, size)
                self._add(self._chunk(flags, Chunk.OFFSET_HOLE, cookie, start, len(hole)) + hole)
            else:
                self._add(self._data(flags, cookie, start, offset, size))
                self.parts += parts
                self.size += size
            offset += size

    def status(self, cookie: int, start: int, found: list[tuple[Context, list[Extent]]]) -> None:
        """Add a chunk for each context."""
        for number, (context, extents) in enumerate(found, 1):
            payload = b"".join((U32.pack(context), *(EXTENT.pack(*extent) for extent in extents)))
            self._add_status(number == len(found), Chunk.BLOCK_STATUS, cookie, start, payload)

    def _add_status(self, last: bool, kind: Chunk, cookie: int, start: int, payload: bytes) -> None:
        self._add(self._chunk(CHUNK_DONE if last else 0, kind, cookie, start, len(payload)) + payload)


class ExtendedReplies(StructuredReplies):
    """What a client gets that asked for extended headers: chunks for everything, with 64-bit lengths."""

    __slots__ = ()

    def _chunk(self, flags: int, kind: Chunk, cookie: int, start: int, length: int) -> bytes:
        return EXTENDED_CHUNK.pack(EXTENDED_CHUNK_MAGIC, flags, kind, cookie, start, length)

    def _data(self, flags: int, cookie: int, start: int, offset: int, size: int) -> bytes:
        return EXTENDED_DATA_CHUNK.pack(
            EXTENDED_CHUNK_MAGIC, flags, _OFFSET_DATA, cookie, start, U64.size + size, offset
        )

    def done(self, cookie: int, start: int) -> None:
        """Add the empty chunk."""
        self._add(self._chunk(CHUNK_DONE, Chunk.NONE, cookie, start, 0))

    def status(self, cookie: int, start: int, found: list[tuple[Context, list[Extent]]]) -> None:
        """Add a chunk for each context."""
        for number, (context, extents) in enumerate(found, 1):
            count = U32.pack(context) + U32.pack(len(extents))
            payload = b"".join((count, *(EXTENDED_EXTENT.pack(*extent) for extent in extents)))
            self._add_status(number == len(found), Chunk.BLOCK_STATUS_EXT, cookie, start, payload)


def _is_zero(part: Buffer) -> bool:
    return part is ZERO_PAGE or (isinstance(part, memoryview) and part.obj is ZERO_PAGE)


def _is_data(_: Buffer) -> bool:
    return False
