"""A log of objects in segments of 256 KiB.

    segment 0          segment 1                               segment 2
    +-------+---------+--------+--------+-------+------------+--------------
    | label | nothing | object | object | zeros | object ... |
    +-------+---------+--------+--------+-------+------------+--------------
                                        ^ to the end of a block, where a write ended

Objects (see objects.py) start at multiples of 16 bytes, and do not reach over the end of a segment. What is written
together is one write; the next one begins with a block of its own, so that nothing is ever written over.

Which objects are live is for the caller to know; the store only counts, for each segment, the units that live objects
have. A segment without any is given back to the medium and can be used again. Which objects may be in a segment is
found by following their lengths.

Methods that count ("the caller holds the device's lock") exclude each other. One thread at a time appends, flushes and
cleans. Any number may read, and give back what they have taken.
"""

import errno
import heapq
import struct
import threading
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum

from zramd.backing.medium import BLOCK, Medium, aligned_buffer
from zramd.backing.objects import HEADER, UNIT, DamagedObjectError, Sealer, units_of
from zramd.layout import (
    BACKING_UNIT_SHIFT,
    ENTRY_HANDLE_MASK,
    NOBODY,
    OBJECT_OVERHEAD,
    PAGE_SIZE,
    SEGMENT_SHIFT,
    SEGMENT_UNITS_SHIFT,
    WORD,
)
from zramd.memory import private_memory

SEGMENT = 1 << SEGMENT_SHIFT
LEAST_SEGMENTS = 4
"""The label's, one to move objects to, and two that can be filled."""
SPARE = 1
"""Segments that only cleaning may use."""
NONCES = 1 << 16
"""Reserved at a time."""
SPARSE = (1 << SEGMENT_UNITS_SHIFT) * 7 // 8
"""Units: a segment with more live ones is not worth cleaning."""
LARGEST = 3 * BLOCK
"""The blocks that an object may touch."""
TOGETHER = 32 * BLOCK
"""Most that is read at a time of objects that lie near each other."""
NEAR = 4 * BLOCK
"""Most that is read between two of them, which nobody wants: it takes less time than to read again."""

LABEL = struct.Struct("<8sQ16s")
LABEL_MAGIC = b"zramd\0BK"
LABEL_VERSION = 1

_LIVE, _NEXT = 0, 1
_FREE, _USED = 0, 1
_ZEROS = bytes(UNIT)


class FullError(Exception):
    """There is no segment left to write to."""


class Kept(IntEnum):
    """Words that have to outlive the process for as long as the key does."""

    NONCES = 0  # so many may have been used
    READS = 1  # blocks
    WRITES = 2
    END = 3


class Store:
    """A store on a medium, of which the first `segments` segments are used. `kept` has the words of `Kept`.

    Attributes:
        records: two words for each segment: see zramd/layout.py.
    """

    def __init__(self, medium: Medium, key: bytes, kept: memoryview, segments: int) -> None:
        self.medium = medium
        self.segments = segments
        self.records = private_memory(2 * WORD * segments).cast("Q")[: 2 * segments]
        self.records[_NEXT] = NOBODY
        self._sealer = Sealer(key)
        self._kept = kept
        self._nonce = self._last_nonce = kept[Kept.NONCES]
        self._reused = array("I", bytes(4)) * segments
        self._state = bytearray(segments)
        self._state[0] = _USED
        self._hint = 1
        self._free = segments - 1
        self._segment = 0  # that is written to; 0: none
        self._ended: list[int] = []  # that were written to since it was last looked for emptied ones
        self._fill = self._written = 0  # bytes of it
        self._buffer = aligned_buffer(SEGMENT)
        self._reading = aligned_buffer(SEGMENT)
        self._buffers: list[memoryview] = []
        self._large_buffers: list[memoryview] = []
        self._lock = threading.Lock()

    def read(self, place: int, number: int, length: int) -> bytes:
        """Return the data of an object.

        Raises:
            OSError: the medium failed.
            DamagedObjectError: the object is not what was written.
        """
        first, end = _blocks_of(place, length)
        with self._blocks(first, end, self._buffers, LARGEST) as blocks:
            return self._sealer.unseal(number, length, blocks[(place << BACKING_UNIT_SHIFT) - first :])

    @contextmanager
    def _blocks(self, first: int, end: int, buffers: list[memoryview], most: int) -> Iterator[memoryview]:
        """Read blocks to one of `buffers`, which have room for `most` bytes each, and have it for a moment."""
        with self._lock:
            buffer = buffers.pop() if buffers else aligned_buffer(most)
        try:
            self.medium.read(buffer[: end - first], first)
            yield buffer
        finally:
            with self._lock:
                buffers.append(buffer)
                self._kept[Kept.READS] += (end - first) // BLOCK

    def read_together(self, objects: Iterable[tuple[int, int, int]]) -> dict[int, bytes]:
        """Return the data of objects, given as (place, number, length), by number.

        Those that lie near each other are read at a time. What cannot be read, or is damaged, is left out, and perhaps
        what lies near it: `read` tells.
        """
        found: dict[int, bytes] = {}
        group: list[tuple[int, int, int]] = []
        first = end = 0
        for place, number, length in sorted(objects):
            start, stop = _blocks_of(place, length)
            if group and (start - end > NEAR or stop - first > TOGETHER):
                found |= self._read_group(group, first, end)
                group = []
            if not group:
                first = start
            group.append((place, number, length))
            end = stop
        return found | self._read_group(group, first, end) if group else found

    def _read_group(self, group: list[tuple[int, int, int]], first: int, end: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        with suppress(OSError), self._blocks(first, end, self._large_buffers, TOGETHER) as blocks:
            for place, number, length in group:
                with suppress(DamagedObjectError):
                    sealed = blocks[(place << BACKING_UNIT_SHIFT) - first :]
                    found[number] = self._sealer.unseal(number, length, sealed)
        return found

    def reused(self, place: int) -> int:
        """Return how often the segment of a place has been used again. The caller holds the device's lock."""
        return self._reused[place >> SEGMENT_UNITS_SHIFT]

    def has_room(self, length: int) -> bool:
        """Say whether an object fits in the segment that is being filled."""
        return self._segment != 0 and self._fill + OBJECT_OVERHEAD + length <= SEGMENT

    def append(self, number: int, data: bytes) -> int:
        """Add an object for which there is room; return its place. It is there after the next `flush`."""
        place = self._segment << SEGMENT_UNITS_SHIFT | self._fill >> BACKING_UNIT_SHIFT
        sealed = self._sealer.seal(number, self._next_nonce(), data)
        end = self._fill + len(sealed)
        self._buffer[self._fill : end] = sealed
        self._fill = self._fill + (units_of(len(data)) << BACKING_UNIT_SHIFT)
        self._buffer[end : self._fill] = bytes(self._fill - end)
        return place

    def _next_nonce(self) -> int:
        if self._nonce == self._last_nonce:
            # Noted first: a process that is killed uses none of these again.
            self._last_nonce += NONCES
            with self._lock:
                self._kept[Kept.NONCES] = self._last_nonce
        self._nonce += 1
        return self._nonce - 1

    def flush(self) -> None:
        """Write what was appended.

        Raises:
            OSError: that failed, and nothing of it is there. What is appended next goes to another segment.
        """
        end = (self._fill + BLOCK - 1) & -BLOCK
        if end == self._written:
            return
        self._buffer[self._fill : end] = bytes(end - self._fill)
        try:
            self.medium.write(self._buffer[self._written : end], (self._segment << SEGMENT_SHIFT) + self._written)
        except OSError:
            self.end_segment()
            raise
        with self._lock:
            self._kept[Kept.WRITES] += (end - self._written) // BLOCK
        self._written = self._fill = end

    def end_segment(self) -> None:
        """Append no more to the segment that is being filled, if there is one. What was appended has been flushed."""
        with self._lock:
            if self._segment:
                self._ended.append(self._segment)
            self._segment = 0

    def begin_segment(self, spare: int = SPARE) -> None:
        """Begin to fill another segment, but leave some.

        Raises:
            FullError: there is none.
        """
        self.end_segment()
        with self._lock:
            if self._free <= spare:
                raise FullError("the backing store is full")
            found = self._state.find(_FREE, self._hint)
            segment = found if found > 0 else self._state.index(_FREE)
            self._state[segment] = _USED
            self._hint = segment + 1
            self._free -= 1
            self._reused[segment] = (self._reused[segment] + 1) & 0xFFFFFFFF
            self._segment, self._fill, self._written = segment, 0, 0

    def keep(self, place: int, length: int) -> None:
        """Count an object as live. The caller holds the device's lock."""
        units = units_of(length)
        self.records[_LIVE] += units
        self.records[2 * (place >> SEGMENT_UNITS_SHIFT) + _LIVE] += units

    def free(self, place: int, length: int) -> None:
        """Count an object as live no more. The caller holds the device's lock."""
        records, record, units = self.records, 2 * (place >> SEGMENT_UNITS_SHIFT), units_of(length)
        records[_LIVE] -= units
        records[record + _LIVE] -= units
        if not records[record + _LIVE] and not records[record + _NEXT]:
            records[record + _NEXT] = records[_NEXT]
            records[_NEXT] = record >> 1

    def adopt(self, place: int, length: int) -> None:
        """Count an object that an earlier process wrote as live, before anything is appended.

        Raises:
            DamagedObjectError: there is no such place.
        """
        segment = place >> SEGMENT_UNITS_SHIFT
        end = (place & (1 << SEGMENT_UNITS_SHIFT) - 1) + units_of(length)
        if not 0 < segment < self.segments or end > 1 << SEGMENT_UNITS_SHIFT:
            raise DamagedObjectError("there is no such place in the backing store")
        if self._state[segment] == _FREE:
            self._state[segment] = _USED
            self._free -= 1
        self.keep(place, length)

    @property
    def live_bytes(self) -> int:
        """Bytes of live objects."""
        return self.records[_LIVE] << BACKING_UNIT_SHIFT

    @property
    def has_emptied(self) -> bool:
        """Say whether there may be something to take."""
        return bool(self._ended) or self.records[_NEXT] != NOBODY

    def take_emptied(self) -> list[int]:
        """Return segments without live objects that have to be given back, not all if they are many.

        The caller holds the device's lock.
        """
        records = self.records
        with self._lock:
            ended, self._ended = self._ended, []
        # Those that have got no objects, or lost them while they were being filled, are not on the list.
        found = [segment for segment in ended if not any(records[2 * segment : 2 * segment + 2])]
        while records[_NEXT] != NOBODY and len(found) < 64:
            segment = records[_NEXT]
            records[_NEXT], records[2 * segment + _NEXT] = records[2 * segment + _NEXT], 0
            # What is being filled is looked at when that has ended. Others may have got objects since.
            if segment != self._segment and self._state[segment] == _USED and not records[2 * segment + _LIVE]:
                found.append(segment)
        return found

    def give_back(self, segments: list[int]) -> None:
        """Give segments without live objects back to the medium."""
        for segment in segments:
            self.medium.discard(segment << SEGMENT_SHIFT, SEGMENT)
            with self._lock:
                self._state[segment] = _FREE
                self._free += 1

    @property
    def has_segments(self) -> bool:
        """Say whether there is a segment to fill, beside those that only cleaning may use."""
        return self._free > SPARE

    def sparsest(self, most: int) -> list[int]:
        """Return segments with few live units, the one with the fewest first."""
        candidates = (
            (self.records[2 * segment + _LIVE], segment)
            for segment in range(1, self.segments)
            if self._state[segment] == _USED and segment != self._segment
        )
        return [segment for live, segment in heapq.nsmallest(most, candidates) if 0 < live <= SPARSE]

    def objects(self, segment: int) -> Iterator[tuple[int, int, int]]:
        """Yield (place, number, length) of what may be an object in a segment; `unseal` tells.

        The segment is read first, and `unseal` works until the next one is.

        Raises:
            OSError: the medium failed.
        """
        self.medium.read(self._reading, segment << SEGMENT_SHIFT)
        with self._lock:
            self._kept[Kept.READS] += SEGMENT // BLOCK
        position = 0
        while position <= SEGMENT - HEADER.size:
            number, _, _, length, _ = HEADER.unpack_from(self._reading, position)
            # A header is longer than a unit: behind the last unit of a block, its length would be the next object's.
            ended = self._reading[position : position + UNIT] == _ZEROS
            if not ended and 0 < length <= PAGE_SIZE and position + OBJECT_OVERHEAD + length <= SEGMENT:
                yield (segment << SEGMENT_SHIFT) + position >> BACKING_UNIT_SHIFT, number, length
                position += units_of(length) << BACKING_UNIT_SHIFT
            else:
                position = (position // BLOCK + 1) * BLOCK

    def unseal(self, place: int, number: int, length: int) -> bytes:
        """Return the data of an object of the segment that `objects` has read.

        Raises:
            DamagedObjectError: the object is not what was written.
        """
        start = (place << BACKING_UNIT_SHIFT) & (SEGMENT - 1)
        return self._sealer.unseal(number, length, self._reading[start:])

    def close(self, *, wait: bool = True) -> None:
        """Let go of the medium (see `Medium.close`) and of the words that are kept."""
        self.medium.close(wait=wait)
        with self._lock:
            self._kept.release()
            self._kept = memoryview(bytearray(Kept.END * WORD)).cast("Q")


def _blocks_of(place: int, length: int) -> tuple[int, int]:
    """Return where the blocks of an object start and end, in bytes."""
    start = place << BACKING_UNIT_SHIFT
    return start & -BLOCK, (start + OBJECT_OVERHEAD + length + BLOCK - 1) & -BLOCK


def require_segments(medium: Medium) -> int:
    """Return how many segments a medium has room for.

    Raises:
        OSError: EINVAL, they are too few.
    """
    segments = min(medium.size >> SEGMENT_SHIFT, ENTRY_HANDLE_MASK >> SEGMENT_UNITS_SHIFT)
    if segments < LEAST_SEGMENTS:
        least = LEAST_SEGMENTS * SEGMENT
        raise OSError(errno.EINVAL, f"it has {medium.size} bytes, and {least} are needed", str(medium.path))
    return segments


def write_label(medium: Medium, identity: uuid.UUID) -> None:
    """Write to a medium whose store it has, over whatever is there.

    Raises:
        OSError: that failed.
    """
    block = aligned_buffer(BLOCK)
    LABEL.pack_into(block, 0, LABEL_MAGIC, LABEL_VERSION, identity.bytes)
    medium.write(block, 0)


def check_label(medium: Medium, identity: uuid.UUID, segments: int) -> None:
    """Check that a medium has a certain store.

    Raises:
        OSError: the medium failed.
        DamagedObjectError: it has not.
    """
    block = aligned_buffer(BLOCK)
    medium.read(block, 0)
    if LABEL.unpack_from(block) != (LABEL_MAGIC, LABEL_VERSION, identity.bytes):
        raise DamagedObjectError("it is not the backing store of this disk, or was overwritten")
    if medium.size < segments * SEGMENT:
        raise DamagedObjectError(f"it has become smaller: {medium.size} bytes instead of {segments * SEGMENT}")
