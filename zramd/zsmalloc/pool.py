"""The zsmalloc pool: malloc, free and map on opaque handles.

Which zspage an allocation takes, and which object in it, is decided exactly as in Linux 6.18 (mm/zsmalloc.c), since
that decides how much memory a history of allocations ends up using.

A handle is an index into the handle table; its word says where the object lies now. The pool is not thread-safe:
the device's lock guards it.
"""

from collections.abc import Callable

from zramd.layout import (
    HANDLE_CLASS_MASK,
    HANDLE_CLASS_SHIFT,
    HANDLE_IN_USE,
    HANDLE_INDEX_MASK,
    HANDLE_INDEX_SHIFT,
    HANDLE_ZSPAGE_SHIFT,
    HEADER_IN_USE,
    PAGE_SIZE,
    WORD,
)
from zramd.memory import NoMemoryError, Region
from zramd.zsmalloc.arena import Arena
from zramd.zsmalloc.classes import FULL, FULLNESS_GROUPS, RAW_CLASSES, Geometry, SizeClass, fullness_group

HANDLE_CHUNK = PAGE_SIZE * 16 // WORD
"""Handles populated at once: 64 KiB of the handle table."""

ADDRESS_SPACE = 1 << 46
"""Bytes of addresses for all arenas of a pool: half of what a process has on x86-64."""

MAX_ZSPAGES = (1 << 32) - 2
"""Zspages in an arena: their numbers, and a list link one higher, take 32 bits."""

OpenRegion = Callable[[str, int], Region]
"""Opens the region of a name and a size in bytes."""

Payload = bytes | bytearray | memoryview


def max_disksize(geometry: Geometry) -> int:
    """Return the most bytes that a pool of this geometry can serve: its huge pages need one arena of that size."""
    return ADDRESS_SPACE // geometry.chain_size


class _ClassState:
    """The zspages of one size class, by fullness.

    `heads[group]` is the first zspage + 1 of a list, 0 if it is empty; bit `group` of `filled` says which lists are
    not. Groups 0 (released at once) and 11 (full) need no list: nothing is ever allocated from them.
    """

    __slots__ = ("arena", "filled", "group_of", "heads", "size", "size_class", "span", "zspages")

    def __init__(self, size_class: SizeClass, arena: Arena) -> None:
        self.size_class = size_class
        self.arena = arena
        self.size = size_class.size
        self.span = size_class.zspage_bytes
        self.heads = [0] * FULLNESS_GROUPS
        self.filled = 0
        self.group_of = bytes(fullness_group(used, size_class.objects) for used in range(size_class.objects + 1))
        self.zspages = 0

    def push(self, zspage: int, group: int) -> None:
        """Put a zspage at the head of a fullness list."""
        arena = self.arena
        head = self.heads[group]
        arena.preceding[zspage] = 0
        arena.following[zspage] = head
        if head:
            arena.preceding[head - 1] = zspage + 1
        self.heads[group] = zspage + 1
        self.filled |= 1 << group

    def remove(self, zspage: int, group: int) -> None:
        """Take a zspage off its fullness list."""
        arena = self.arena
        before, after = arena.preceding[zspage], arena.following[zspage]
        if after:
            arena.preceding[after - 1] = before
        if before:
            arena.following[before - 1] = after
        else:
            self.heads[group] = after
            if not after:
                self.filled &= ~(1 << group)

    def take_object(self) -> tuple[int, int, bool]:
        """Return (zspage, object index, whether the zspage is new) of a free object, now counted as used."""
        arena = self.arena
        if self.filled:
            group = self.filled.bit_length() - 1
            zspage = self.heads[group] - 1
            used = arena.used[zspage] + 1
            arena.used[zspage] = used
            after = self.group_of[used]
            if after != group:
                self.remove(zspage, group)
                if after != FULL:
                    self.push(zspage, after)
            index = arena.free[zspage]
            if index:
                index -= 1
                link = arena.region.words[(zspage * self.span + index * self.size) >> 3]
                arena.free[zspage] = link >> 1
            else:
                index = arena.fresh[zspage]
                arena.fresh[zspage] = index + 1
            return zspage, index, False
        zspage = arena.take()
        arena.size_class[zspage] = self.size_class.index + 1
        arena.used[zspage] = arena.fresh[zspage] = 1
        arena.free[zspage] = 0
        group = self.group_of[1]
        if group != FULL:
            self.push(zspage, group)
        self.zspages += 1
        return zspage, 0, True

    def give_object(self, zspage: int, index: int) -> bool:
        """Free an object. Return whether its zspage went with it."""
        arena = self.arena
        used = arena.used[zspage]
        before = self.group_of[used]
        used -= 1
        arena.used[zspage] = used
        if not used:
            if before != FULL:
                self.remove(zspage, before)
            self.zspages -= 1
            arena.give(zspage)
            return True
        arena.region.words[(zspage * self.span + index * self.size) >> 3] = arena.free[zspage] << 1
        arena.free[zspage] = index + 1
        after = self.group_of[used]
        if after != before:
            if before != FULL:
                self.remove(zspage, before)
            self.push(zspage, after)
        return False


class Pool:
    """A zsmalloc pool for at most `objects` objects at a time, in regions that `open_region` opens.

    Attributes:
        pages: pages in zspages now, the kernel's zs_get_total_pages.
    """

    def __init__(self, geometry: Geometry, objects: int, open_region: OpenRegion) -> None:
        self.geometry = geometry
        self.pages = 0
        self.arenas: list[Arena] = []
        # Handle 0 is no handle. The kernel allocates an overwriting object before it frees the old one: one spare.
        self._handle_limit = objects + 2
        size = -(-self._handle_limit // HANDLE_CHUNK) * HANDLE_CHUNK * WORD
        self.handle_region = open_region("handles", size)
        self._handles = self.handle_region.words
        self._free_handle = 0
        self._next_handle = 1
        self._ready_handles = 0
        for pages in range(1, geometry.chain_size + 1):
            span = pages * PAGE_SIZE
            share = ADDRESS_SPACE // geometry.chain_size
            zspages = min(objects + 1, share // span, MAX_ZSPAGES)
            self.arenas.append(Arena(open_region(f"arena{pages}", zspages * span), pages))
        states = {kept.index: _ClassState(kept, self.arenas[kept.pages - 1]) for kept in geometry.kept()}
        self.classes = [states[geometry.classes[raw].index] for raw in range(RAW_CLASSES)]
        self._class_for = [self.classes[0]] + [
            states[geometry.class_of(length).index] for length in range(1, PAGE_SIZE + 1)
        ]

    def store(self, payload: Payload) -> int:
        """Allocate an object of `len(payload)` bytes, copy the payload in, and return its handle.

        Raises:
            ValueError: the length is not in 1..4096.
            NoMemoryError: there is no room; nothing changed.
        """
        length = len(payload)
        if not 0 < length <= PAGE_SIZE:
            raise ValueError(f"an object has 1 to {PAGE_SIZE} bytes, not {length}")
        handle, offset, arena = self._allocate(self._class_for[length])
        arena.region.map[offset : offset + length] = payload
        return handle

    def malloc(self, length: int) -> int:
        """Allocate an object of `length` bytes (1..4096), its contents undefined, and return its handle.

        Raises:
            ValueError: the length is out of range.
            NoMemoryError: there is no room; nothing changed.
        """
        if not 0 < length <= PAGE_SIZE:
            raise ValueError(f"an object has 1 to {PAGE_SIZE} bytes, not {length}")
        return self._allocate(self._class_for[length])[0]

    def _allocate(self, state: _ClassState) -> tuple[int, int, Arena]:
        """Return (handle, offset of the payload in the arena, arena)."""
        handle = self._free_handle
        if not handle and self._next_handle >= self._ready_handles:
            self._grow_handles()
        zspage, index, new = state.take_object()
        size_class = state.size_class
        if new:
            self.pages += size_class.pages
        if handle:
            self._free_handle = self._handles[handle] >> 1
        else:
            handle = self._next_handle
            self._next_handle = handle + 1
        arena = state.arena
        offset = zspage * state.span
        if state.size != PAGE_SIZE:
            offset += index * state.size
            arena.region.words[offset >> 3] = handle << 1 | HEADER_IN_USE
            offset += WORD
        self._handles[handle] = (
            zspage << HANDLE_ZSPAGE_SHIFT
            | size_class.index << HANDLE_CLASS_SHIFT
            | index << HANDLE_INDEX_SHIFT
            | HANDLE_IN_USE
        )
        return handle, offset, arena

    def _grow_handles(self) -> None:
        if self._next_handle >= self._handle_limit:
            raise NoMemoryError("every handle is in use")
        self.handle_region.populate(self._ready_handles * WORD, HANDLE_CHUNK * WORD)
        self._ready_handles += HANDLE_CHUNK

    def restore_handles(self, free: int, following: int, ready: int) -> None:
        """Take over a handle table: head of the free list, first handle never used, number that may be touched."""
        self._free_handle = free
        self._next_handle = following
        self._ready_handles = ready

    def map(self, handle: int, length: int | None = None) -> memoryview:
        """Return a view of an object's first `length` payload bytes, or of all that its class has room for.

        The view shows the object until the object is freed or moved.

        Raises:
            KeyError: there is no such object.
        """
        word = self._handles[handle] if 0 < handle < self._next_handle else 0
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
            KeyError: there is no such object.
        """
        handles = self._handles
        word = handles[handle] if 0 < handle < self._next_handle else 0
        if not word & HANDLE_IN_USE:
            raise KeyError(f"no object has the handle {handle}")
        state = self.classes[word >> HANDLE_CLASS_SHIFT & HANDLE_CLASS_MASK]
        if state.give_object(word >> HANDLE_ZSPAGE_SHIFT, word >> HANDLE_INDEX_SHIFT & HANDLE_INDEX_MASK):
            self.pages -= state.size_class.pages
        handles[handle] = self._free_handle << 1
        self._free_handle = handle
