"""The zsmalloc pool: malloc, free and map on opaque handles.

Which zspage an allocation takes, and which object in it, is decided exactly as in Linux 6.18 (mm/zsmalloc.c), since
that decides how much memory a history of allocations ends up using.

A handle is an index into the handle table; its word says where the object lies now. The pool is not thread-safe:
the device's lock guards it.
"""

import os
from collections.abc import Callable

from zramd.layout import (
    FULL,
    HANDLE_CLASS_MASK,
    HANDLE_CLASS_SHIFT,
    HANDLE_IN_USE,
    HANDLE_INDEX_MASK,
    HANDLE_INDEX_SHIFT,
    HANDLE_ZSPAGE_SHIFT,
    HEADER_IN_USE,
    NOBODY,
    PAGE_SIZE,
    WORD,
    ClassRecord,
    PoolRecord,
)
from zramd.memory import NoMemoryError, Region, record
from zramd.zsmalloc.arena import Arena
from zramd.zsmalloc.classes import RAW_CLASSES, Geometry, SizeClass, fullness_groups

HANDLE_CHUNK = PAGE_SIZE * 16 // WORD
"""Handles populated at once: 64 KiB of the handle table."""

ADDRESS_SPACE = 1 << 46
"""Bytes of addresses for all arenas of a pool: half of what a process has on x86-64."""

MAX_ZSPAGES = (1 << 32) - 2
"""Zspages in an arena: their numbers, and a list link one higher, take 32 bits."""

_FILLED, _ZSPAGES, _LIVE, _HEADS, _COUNTS, _END = map(int, ClassRecord)
_PAGES, _FREE_HANDLE, _NEXT_HANDLE, _READY_HANDLES, _LOW_HANDLE, _WAKE, _ = map(int, PoolRecord)

OpenRegion = Callable[[str, int], Region]
"""Opens the region of a name and a size in bytes."""

Payload = bytes | bytearray | memoryview


def max_disksize(geometry: Geometry) -> int:
    """Return the most bytes that a pool of this geometry can serve: its huge pages need one arena of that size."""
    return ADDRESS_SPACE // geometry.chain_size


class ClassState:
    """The zspages of one size class, by fullness.

    `record` holds what changes (see zramd/layout.py); `heads` and `counts` are parts of it. Groups 0 (released at once)
    and 11 (full) need no list: nothing is ever allocated from them.

    The arena's columns stand here too, since every allocation and every free goes through them. The `preceding` of a
    list's head means nothing.
    """

    __slots__ = (
        "arena",
        "counts",
        "following",
        "free",
        "fresh",
        "group_of",
        "heads",
        "map",
        "objects",
        "pages",
        "preceding",
        "record",
        "size",
        "size_class",
        "span",
        "used",
        "word",
        "words",
    )

    def __init__(self, size_class: SizeClass, arena: Arena) -> None:
        self.size_class = size_class
        self.arena = arena
        self.used, self.free, self.fresh = arena.used, arena.free, arena.fresh
        self.following, self.preceding = arena.following, arena.preceding
        self.map, self.words = arena.region.map, arena.region.words
        self.size = size_class.size
        self.span = size_class.zspage_bytes
        self.pages = size_class.pages
        self.objects = size_class.objects
        self.word = size_class.index << HANDLE_CLASS_SHIFT | HANDLE_IN_USE
        self.record = record(_END)
        self.heads = self.record[_HEADS:_COUNTS]
        self.counts = self.record[_COUNTS:_END]
        self.group_of = fullness_groups(size_class.objects)

    @property
    def filled(self) -> int:
        """Which fullness lists are not empty, a bit for each."""
        return self.record[_FILLED]

    @property
    def zspages(self) -> int:
        """How many zspages the class has."""
        return self.record[_ZSPAGES]

    @property
    def live(self) -> int:
        """How many objects are in use."""
        return self.record[_LIVE]

    @property
    def freeable(self) -> int:
        """Return how many pages compaction could free at best (zs_can_compact)."""
        return (self.zspages * self.objects - self.live) // self.objects * self.pages

    def adopt(self, objects: int) -> None:
        """Count a zspage that was found with so many objects in use."""
        self.record[_ZSPAGES] += 1
        self.record[_LIVE] += objects

    def regroup(self, zspage: int, before: int, after: int) -> None:
        """Move a zspage to the head of another fullness list; group 11, which is full or no group, has none."""
        following, heads = self.following, self.heads
        if before != FULL:
            self.counts[before] -= 1
            neighbour = following[zspage]
            if heads[before] == zspage + 1:
                heads[before] = neighbour
                if not neighbour:
                    self.record[_FILLED] &= ~(1 << before)
            else:
                previous = self.preceding[zspage]
                following[previous - 1] = neighbour
                if neighbour:
                    self.preceding[neighbour - 1] = previous
        if after != FULL:
            self.counts[after] += 1
            head = heads[after]
            following[zspage] = head
            heads[after] = zspage + 1
            if head:
                self.preceding[head - 1] = zspage + 1
            else:
                self.record[_FILLED] |= 1 << after

    def new_zspage(self) -> int:
        """Return a zspage of this class with one object, its first, in use.

        Raises:
            NoMemoryError: there is no room.
        """
        zspage = self.arena.take()
        self.arena.size_class[zspage] = self.size_class.index + 1
        self.used[zspage] = self.fresh[zspage] = 1
        self.free[zspage] = 0
        self.record[_ZSPAGES] += 1
        self.regroup(zspage, FULL, self.group_of[1])
        return zspage

    def release_zspage(self, zspage: int, group: int) -> None:
        """Give back a zspage of which no object is in use; `group` is that of its last object."""
        self.regroup(zspage, group, FULL)
        self.record[_ZSPAGES] -= 1
        self.arena.give(zspage)


class Pool:
    """A zsmalloc pool for at most `objects` objects at a time, in regions that `open_region` opens.

    With `checksums` there is a region with a word for each handle, for its user's use.

    `record` holds what changes beside classes and arenas (see zramd/layout.py).
    """

    def __init__(self, geometry: Geometry, objects: int, open_region: OpenRegion, *, checksums: bool = False) -> None:
        self.geometry = geometry
        self.record = record(PoolRecord.END)
        self.record[_NEXT_HANDLE] = 1
        self.record[_LOW_HANDLE] = NOBODY
        self.arenas: list[Arena] = []
        # Handle 0 is no handle. The kernel allocates an overwriting object before it frees the old one: one spare.
        size = -(-(objects + 2) // HANDLE_CHUNK) * HANDLE_CHUNK * WORD
        self.handle_region = open_region("handles", size)
        self._handles = self.handle_region.words
        self.checksum_region = open_region("checksums", size) if checksums else None
        for pages in range(1, geometry.chain_size + 1):
            span = pages * PAGE_SIZE
            share = ADDRESS_SPACE // geometry.chain_size
            zspages = min(objects + 1, share // span, MAX_ZSPAGES)
            self.arenas.append(Arena(open_region(f"arena{pages}", zspages * span), pages))
        states = {kept.index: ClassState(kept, self.arenas[kept.pages - 1]) for kept in geometry.kept()}
        self.classes = [states[geometry.classes[raw].index] for raw in range(RAW_CLASSES)]
        self.class_for: list[ClassState | None] = [None]
        self.class_for += (states[size_class.index] for size_class in geometry.class_of[1:])

    @property
    def pages(self) -> int:
        """Pages in zspages now, the kernel's zs_get_total_pages."""
        return self.record[_PAGES]

    @pages.setter
    def pages(self, pages: int) -> None:
        self.record[_PAGES] = pages

    def malloc(self, length: int, payload: Payload | None = None) -> int:
        """Allocate an object of `length` bytes (1..4096) and return its handle.

        It holds `payload` (of that length), or whatever was there before.

        Raises:
            ValueError: the length is out of range.
            NoMemoryError: there is no room; nothing changed.
        """
        state = self.class_for[length] if length <= PAGE_SIZE else None
        if state is None:
            raise ValueError(f"an object has 1 to {PAGE_SIZE} bytes, not {length}")
        pool, record = self.record, state.record
        handle = pool[_FREE_HANDLE]
        if not handle and pool[_NEXT_HANDLE] >= pool[_READY_HANDLES]:
            self.grow_handles()
        filled = record[_FILLED]
        if filled:
            group = filled.bit_length() - 1
            zspage = state.heads[group] - 1
            used = state.used[zspage] + 1
            state.used[zspage] = used
            after = state.group_of[used]
            if after != group:
                state.regroup(zspage, group, after)
            index = state.free[zspage]
            if index:
                index -= 1
                offset = zspage * state.span + index * state.size
                state.free[zspage] = state.words[offset >> 3] >> 1
            else:
                index = state.fresh[zspage]
                state.fresh[zspage] = index + 1
                offset = zspage * state.span + index * state.size
        else:
            zspage = state.new_zspage()
            pool[_PAGES] += state.pages
            index = 0
            offset = zspage * state.span
        record[_LIVE] += 1
        handles = self._handles
        if handle:
            pool[_FREE_HANDLE] = handles[handle] >> 1
        else:
            handle = pool[_NEXT_HANDLE]
            pool[_NEXT_HANDLE] = handle + 1
            if handle == pool[_LOW_HANDLE]:
                os.eventfd_write(pool[_WAKE], 1)
        handles[handle] = zspage << HANDLE_ZSPAGE_SHIFT | index << HANDLE_INDEX_SHIFT | state.word
        if state.size != PAGE_SIZE:
            state.words[offset >> 3] = handle << 1 | HEADER_IN_USE
            offset += WORD
        if payload is not None:
            state.map[offset : offset + length] = payload
        return handle

    def grow_handles(self) -> None:
        """Populate more of the handle table.

        Raises:
            NoMemoryError: there is no room.
        """
        start, length = self.next_handles()
        if not length:
            raise NoMemoryError("every handle is in use")
        try:
            self.populate_handles(start, length)
        except NoMemoryError:
            length = PAGE_SIZE
            self.populate_handles(start, length)
        self.add_handles(start, length)

    def next_handles(self) -> tuple[int, int]:
        """Return (offset, length) in bytes of the part of the handle table that is to be populated next."""
        start = self.record[_READY_HANDLES] * WORD
        return start, min(HANDLE_CHUNK * WORD, self.handle_region.size - start)

    def populate_handles(self, start: int, length: int) -> None:
        """Populate a part of the handle table, which another thread may do too. Needs no lock.

        Raises:
            NoMemoryError: there is no room.
        """
        # First what recovery does not look at: where there are handles, there is what belongs to them.
        if self.checksum_region:
            self.checksum_region.populate(start, length, shared=True)
        self.handle_region.populate(start, length, shared=True)

    def add_handles(self, start: int, length: int) -> None:
        """Note that a part of the handle table, next to what could be used, can be used too."""
        self.record[_READY_HANDLES] = max(self.record[_READY_HANDLES], (start + length) // WORD)

    def restore_handles(self, free: int, following: int, ready: int) -> None:
        """Take over a handle table: head of the free list, first handle never used, number that may be touched.

        The words of handles never used are 0.
        """
        self.record[_FREE_HANDLE] = free
        self.record[_NEXT_HANDLE] = following
        self.record[_READY_HANDLES] = ready

    def map(self, handle: int, length: int | None = None) -> memoryview:
        """Return a view of an object's first `length` payload bytes, or of all that its class has room for.

        The view shows the object until the object is freed or moved.

        Raises:
            LookupError: there is no such object.
        """
        word = self._handles[handle]
        if not word & HANDLE_IN_USE:
            raise KeyError(f"no object has the handle {handle}")
        state = self.classes[word >> HANDLE_CLASS_SHIFT & HANDLE_CLASS_MASK]
        start = (word >> HANDLE_ZSPAGE_SHIFT) * state.span
        end = start + state.size
        if state.size != PAGE_SIZE:
            start += (word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK) * state.size
            end = start + state.size
            start += WORD
        return state.arena.region.bytes[start : end if length is None else start + length]

    def unmap(self, view: memoryview) -> None:
        """Give a view up: a later use of it is an error instead of somebody else's data."""
        view.release()

    def free(self, handle: int) -> None:
        """Free an object.

        Raises:
            LookupError: there is no such object.
        """
        handles = self._handles
        word = handles[handle]
        if not word & HANDLE_IN_USE:
            raise KeyError(f"no object has the handle {handle}")
        state = self.classes[word >> HANDLE_CLASS_SHIFT & HANDLE_CLASS_MASK]
        zspage = word >> HANDLE_ZSPAGE_SHIFT
        used = state.used[zspage]
        before = state.group_of[used]
        used -= 1
        state.used[zspage] = used
        state.record[_LIVE] -= 1
        if used:
            index = word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK
            state.words[(zspage * state.span + index * state.size) >> 3] = state.free[zspage] << 1
            state.free[zspage] = index + 1
            after = state.group_of[used]
            if after != before:
                state.regroup(zspage, before, after)
        else:
            state.release_zspage(zspage, before)
            self.record[_PAGES] -= state.pages
        handles[handle] = self.record[_FREE_HANDLE] << 1
        self.record[_FREE_HANDLE] = handle
