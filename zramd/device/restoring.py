"""Restoring a disk: a device is filled with the pages of an image, each stored as it was."""

import errno
import os
import select
import uuid
from collections.abc import Callable
from dataclasses import replace

from xxhash import xxh3_128

from zramd.device.algorithms import codec_number
from zramd.device.entry import size_of
from zramd.device.image import WHOLE_CHECKSUM_BYTES, Chunk, Counts, Header, ImageError, take_part
from zramd.device.saving import count
from zramd.device.slices import pause
from zramd.device.superblock import Identity
from zramd.device.work import Work
from zramd.device.zram import Device
from zramd.layout import (
    ENTRY_RESERVED_MASK,
    ENTRY_SIZE_MASK,
    ENTRY_SIZE_SHIFT,
    ENTRY_STATE_MASK,
    ENTRY_STATE_SHIFT,
    PAGE_SIZE,
    WORD,
    DeviceRecord,
    PageState,
)
from zramd.memory import round_up_to_page
from zramd.sizes import format_size
from zramd.zsmalloc import geometry
from zramd.zsmalloc.pool import max_disksize

LOOK_SECONDS = 0.1
"""How often a reader that waits for more looks whether it is still wanted."""
READ_BYTES = 1 << 20

_SIZE_AND_STATE = ENTRY_SIZE_MASK << ENTRY_SIZE_SHIFT | ENTRY_STATE_MASK << ENTRY_STATE_SHIFT


class Source:
    """What an image is read from: a descriptor of a file or a pipe, which stays open."""

    def __init__(self, fd: int, is_cancelled: Callable[[], bool]) -> None:
        self._fd = fd
        self._is_cancelled = is_cancelled
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._whole = xxh3_128()

    def take(self, length: int) -> bytes:
        """Return the next bytes.

        Raises:
            ImageError: there are fewer.
            OSError: they cannot be read; or ECANCELED.
        """
        data = self._read(length)
        if len(data) < length:
            raise ImageError("it is cut short")
        self._whole.update(data)
        return data

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            while not self._poll.poll(LOOK_SECONDS * 1000):
                self._require_wanted()
            self._require_wanted()
            part = os.read(self._fd, min(READ_BYTES, length - len(data)))
            if not part:
                break
            data += part
        return bytes(data)

    def _require_wanted(self) -> None:
        if self._is_cancelled():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def require_end(self) -> None:
        """Check that all was as it was written, and is at its end.

        Raises:
            ImageError: it is not.
            OSError: as `take`.
        """
        found = self._read(WHOLE_CHECKSUM_BYTES + 1)
        if len(found) < WHOLE_CHECKSUM_BYTES:
            raise ImageError("it is cut short")
        if found[:WHOLE_CHECKSUM_BYTES] != self._whole.digest():
            raise ImageError("it is damaged: the checksum of the whole is wrong")
        if len(found) > WHOLE_CHECKSUM_BYTES:
            raise ImageError("there is something behind its end")


def identity_for(header: Header, disksize: int, *, integrity: bool = False) -> Identity:
    """Return what a device of `disksize` bytes has to be to be filled with an image; it may be given checksums.

    It has a UUID of its own. Who used the disk that was saved, and wrote to it since, must not take it for that.

    Raises:
        ImageError: there cannot be one.
    """
    disksize = round_up_to_page(disksize)
    try:
        limit = max_disksize(geometry(header.chain_size, header.rule))
    except ValueError as error:
        raise ImageError(f"its header makes no sense: {error}") from error
    if not header.disksize <= disksize <= limit:
        raise ImageError(f"the disk can have {header.disksize} to {limit} bytes, not {disksize}")
    return Identity(
        disksize,
        header.algorithms.copy(),
        header.chain_size,
        header.rule,
        uuid.uuid4(),
        header.integrity or integrity,
    )


def fill(device: Device, header: Header, source: Source, mem_limit: int, work: Work) -> Counts:
    """Fill an empty device, which nobody else uses, with what follows the header. Takes the lock.

    Raises:
        ImageError: the image is damaged. What was read of it until then is in the device.
        NoMemoryError: there is no room for it.
        OSError: it cannot be read; ENOSPC: it needs more than `mem_limit` bytes, if that is not 0; ECANCELED.
    """
    found = Counts()
    pages, work.total = header.disksize // PAGE_SIZE, header.pages
    first = 0
    while isinstance(part := take_part(source.take, pages), Chunk):
        if part.first < first:
            raise ImageError("its chunks are not in order")
        first = part.first + 1
        _check(part, device)
        with device:
            _place(part, device)
            used = device.pool.pages * PAGE_SIZE
        if mem_limit and used > mem_limit:
            raise OSError(errno.ENOSPC, f"it needs more memory than mem_limit allows, {format_size(mem_limit)}")
        count(found, part.runs)
        work.done = found.pages
        pause()
    source.require_end()
    with device:
        device.note_filled()
        stored = replace(
            found,
            pages=device.record[DeviceRecord.PAGES_STORED],
            same=device.record[DeviceRecord.SAME_PAGES],
            huge=device.record[DeviceRecord.HUGE_PAGES],
            bytes=device.record[DeviceRecord.COMPR_DATA_SIZE],
        )
    if not part == found == stored or found.pages != header.pages:
        raise ImageError("its pages are not those that its trailer counts")
    return found


def _check(chunk: Chunk, device: Device) -> None:
    """Check that a chunk's entries are such as a device has."""
    codecs = device.identity.algorithms.codecs
    for entry, pages in chunk.runs:
        state, size = entry >> ENTRY_STATE_SHIFT & ENTRY_STATE_MASK, size_of(entry)
        if state == PageState.EMPTY:
            fits = not entry
        elif state == PageState.SAME_FILLED:
            fits = size in (0, WORD) and not entry & ~_SIZE_AND_STATE
        elif state == PageState.HUGE:
            fits = size == PAGE_SIZE
        else:
            # What recompression made may be larger than what a write would have left compressed.
            fits = state == PageState.COMPRESSED and 0 < size < PAGE_SIZE and codecs[codec_number(entry)] is not None
        if not fits or not pages or entry & ENTRY_RESERVED_MASK:
            raise ImageError(f"an entry among the pages from {chunk.first} on makes no sense: {entry:#x}")
    if sum(pages * size_of(entry) for entry, pages in chunk.runs) != len(chunk.data):
        raise ImageError(f"the data of the pages from {chunk.first} on are of another length")


def _place(chunk: Chunk, device: Device) -> None:
    index, position = chunk.first, 0
    for entry, pages in chunk.runs:
        size = size_of(entry)
        if not entry:
            index += pages
            continue
        for _ in range(pages):
            device.place(index, entry, chunk.data[position : position + size])
            index += 1
            position += size
